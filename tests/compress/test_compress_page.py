"""The page about a compressed model: one file, whatever names say, and drawings in proportion to their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from made_reports import EXPERTS, HOSTILE, LAYERS, made, measured, reports

from moectl.compress.report import figures
from moectl.compress.report.page import render
from moectl.compress.report.summary import Layer
from moectl.report.stacked import Part, stacked


def drawings(text: str) -> Iterator[ElementTree.Element]:
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(drawing)


def elements(svg: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if element.tag.endswith(f"}}{tag}")]


def cells(svg: str) -> dict[str, int]:
    """How many cells of a heat map have each colour."""
    root = ElementTree.fromstring(svg)
    return {path.get("fill", ""): path.get("d", "").count("M") for path in elements(root, "path")}


def test_it_is_one_file_and_hostile_names_are_text() -> None:
    found = made(name=HOSTILE, measured=measured(domain=HOSTILE), recipe={"bits": None, "note": HOSTILE})
    text = render(found, f"moectl compress qmoe {HOSTILE}")
    assert "<img" not in text and "\x1b" not in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert set(re.findall(r"https?://[^\"'<\s\\]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r" (src|href|on\w+)=", re.sub(r"&lt;.*?&gt;", "", text))


def test_it_shows_everything_that_is_known() -> None:
    text = render(made(), "moectl compress qmoe model -o out")
    drawn = list(drawings(text))
    assert len(drawn) == 1 + 1 + 4 + 2, "loss, bytes, maps, layers"
    for words in ("What stands out", "Quality", "Where the bits go", "Every expert", "entropy", "moectl compress qmoe"):
        assert words in text
    assert "loss 2.000 → 2.070" in text.split("</title>")[0]


def test_what_was_not_measured_is_not_drawn() -> None:
    text = render(made(measured=None, recipe={"bits": 4}, peak_bytes=None))
    assert len(list(drawings(text))) == 1 + 4 + 1
    assert "Loss was not measured." in text and "rerouted-by-layer" not in text


def test_a_cold_expert_is_black_in_every_map_of_quality() -> None:
    error, bits, zeros, tokens = figures.maps(made(reports(cold=True)))
    for each in (error, bits, zeros):
        assert cells(each.svg)[figures.COLD.colour] == 1 and sum(cells(each.svg).values()) == LAYERS * EXPERTS
    assert figures.COLD.colour not in cells(tokens.svg)
    assert "rounded to nearest" in error.svg and "rounded to nearest" not in next(figures.maps(made())).svg


def test_the_worst_cell_is_named_and_the_darkest() -> None:
    error, *_ = figures.maps(made(reports(error=0.9)))
    assert "0.9 (expert 1 of layer 2)" in error.heading
    assert cells(error.svg) == {figures.SEQUENTIAL[0]: LAYERS * EXPERTS - 1, figures.SEQUENTIAL[-1]: 1}


def test_many_experts_are_pooled_and_layers_may_have_fewer() -> None:
    found = made()
    expert = found.layers[0].experts[0]
    wide = Layer("0", "model.layers.0", (expert,) * 600, 1.0)
    narrow = replace(wide, label="1", experts=(expert,) * 10)
    error, *_ = figures.maps(replace(found, layers=(wide, narrow)))
    assert "3 neighbouring experts" in error.caption
    assert cells(error.svg) == {figures.SEQUENTIAL[0]: 200 + 4, figures.ABSENT.colour: 196}


def test_a_bar_is_cut_in_proportion() -> None:
    parts = [Part("<a>", 3.0, "three"), Part("b", 1.0, "one")]
    root = ElementTree.fromstring(stacked("t", "d", [("x", parts), ("y", parts[1:])]))
    hinted = [element for element in elements(root, "rect") if len(element)]
    widths = [float(element.get("width", "")) + 1 for element in hinted]
    assert widths == pytest.approx([3 * widths[1], widths[1], widths[1]], abs=0.05)
    assert hinted[0][0].text == "x, <a>: three" and hinted[1].get("fill") == hinted[2].get("fill")
