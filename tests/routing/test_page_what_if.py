"""What-ifs on the page: what is drawn is what was found, every drawing is sound, and the sliders say what it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite, log, nan
from typing import Any
from xml.etree import ElementTree

import chromium
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from test_report_page import HOSTILE, LIMIT, NO_BROWSER, Reader, point_at

from moectl.report.curves import BOTTOM, LEFT, RIGHT, WIDTH, Trail, across, curves
from moectl.routing.analysis import Analysis, analyse
from moectl.routing.page.render import render
from moectl.routing.page.what_if import INTRODUCTION, kind, numbered
from moectl.routing.report import Report
from moectl.routing.whatif.advise import Advice, Step, advise
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.machine import Machine, Model
from moectl.routing.whatif.registry import WHAT_IFS

HITS = Curve(
    "How often it is there", "experts held", "hit rate", [1, 2, 4, 8],
    {"LRU": [0.1, 0.3, 0.6, 1.0], "Belady": [0.2, 0.45, 0.8, 1.0], "chance": [0.125, 0.25, 0.5, 1.0]},
    "chance", "Belady", percent=True,
)  # fmt: skip
GAPS = Curve(
    "Speed", "tokens", "tokens/s", [0, 5, 10, 15, 20],
    {"LRU": [None, 2000.0, nan, 4000.0, 5000.0], HOSTILE[0] * 9: [1.0, 2.0, 3.0, 4.0, 5.0], "none": [None] * 5},
)  # fmt: skip
ODD = Finding("odd", HOSTILE[0], ("layer", HOSTILE[1]), (("<b>", nan), ("mean", 0.5)), (HITS, GAPS), (HOSTILE[2],))
ADVICE = Advice("Do <b>nothing</b>.", (Step("cache", "Keep 4 & more.", "One at a time.", "moectl <x>"),), {})


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    tokens = synthetic.tokens(18, 40, domains=("code", "prose"))
    made = synthetic.trace(tokens, layers=3, experts=16, by_domain=1.5, sticky=1.0)
    return analyse("tiny", {"decoder": synthetic.recording(made)})


@pytest.fixture(scope="module")
def report(analysis: Analysis) -> Report:
    """Every what-if with its defaults, a finding that is odd, and advice."""
    trace = analysis.streams[0].recording.trace
    modules = [each.load() for each in WHAT_IFS]
    findings = [ODD, *(module.run(trace, module.Options()) for module in modules)]
    advice = advise(trace, Machine(8, 80, 50), Model(20.0, 3.0, 2048))
    return Report(analysis, findings={"decoder": findings}, advice=advice)


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return render(report)


def drawings(text: str) -> list[str]:
    """The figures of what-ifs."""
    return [
        svg for section in re.findall(r'<section class="panel what-if">.*?</section>', text, re.DOTALL)
        for svg in re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    ]  # fmt: skip


def sound(svg: str) -> None:
    """Every number of a drawing is one, and lies within it."""
    root = ElementTree.fromstring(svg)
    _x, _y, width, height = map(float, (root.get("viewBox") or "").split())
    for each in root.iter():
        for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "width", "height", "r"):
            value = float(each.get(name, 0))
            assert isfinite(value) and -0.5 <= value <= max(width, height), (each.tag, name)
        if each.tag.endswith("path"):
            assert re.fullmatch(r"M[\d.]+ [\d.]+((L[\d.]+ [\d.]+)+|h22)", each.get("d", "")), each.get("d")


def parts(svg: str, tag: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith(f"}}{tag}")]


def points(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))]


def test_every_finding_is_told_drawn_and_tabled(text: str, report: Report) -> None:
    page, words = Reader(text), " ".join(Reader(text).words)
    assert report.advice is not None
    findings = [*report.findings["decoder"], *report.advice.findings.values()]
    assert len(page.having(class_="what-if")) == len(findings) > len(WHAT_IFS)
    for finding in findings[1:]:
        assert finding.headline in words and all(each in words for each in finding.assumptions)
        assert all(column in words for column in finding.columns)
    drawn = [curve for finding in findings for curve in finding.curves]
    assert len(drawings(text)) == len(drawn) == len(page.having(class_="moving")) > 20
    files = [a["data-save"] for _tag, a in page.elements if "data-save" in a]
    assert len(set(files)) == len(files)


def test_every_drawing_is_sound(text: str) -> None:
    for svg in drawings(text):
        sound(svg)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text, re.IGNORECASE), "in no attribute"
    planted = curves("t", "d", [1, 2], [Trail("a", [1.0, 2.0])], ("x", "y"))
    sound(planted)
    for wrong in (planted.replace("L", "Lnan "), planted.replace('x1="70"', 'x1="nan"'), planted.replace("M", "M-")):
        with pytest.raises((AssertionError, ValueError)):
            sound(wrong)


def test_the_sliders_have_what_was_found(text: str, report: Report) -> None:
    page = Reader(text)
    assert report.advice is not None
    findings = [*report.findings["decoder"], *report.advice.findings.values()]
    data = [json.loads(a["data-curve"] or "") for a in page.having(class_="moving")]
    for curve, given_, svg in zip((c for f in findings for c in f.curves), data, drawings(text), strict=True):
        assert given_["x"] == list(curve.x) and given_["percent"] == curve.percent
        assert given_["at"] == sorted(given_["at"]) and len(given_["at"]) == len(curve.x)
        scale = across(curve.x)
        assert given_["at"] == pytest.approx([scale(x) for x in curve.x], abs=0.06)
        for (_label, told), (name, values) in zip(given_["lines"], curve.lines.items(), strict=True):
            known = [None if value is None or not isfinite(value) else value for value in values]
            assert [value is None for value in told] == [value is None for value in known], name
            pairs = [(mine, theirs) for mine, theirs in zip(told, known, strict=True) if theirs is not None]
            assert [p[0] for p in pairs] == pytest.approx([p[1] for p in pairs], rel=1e-3, abs=1e-6)
        (marker,) = [each for each in parts(svg, "line") if each.get("class") == "marker"]
        assert marker.get("visibility") == "hidden" and marker.get("x1") == "0"
    sliders = [a for tag, a in page.elements if tag == "input" and a.get("type") == "range"][1:]
    assert [int(a["max"] or 0) + 1 for a in sliders] == [len(each["x"]) for each in data]
    assert all(int(a["value"] or 0) <= int(a["max"] or 0) for a in sliders)
    assert all("hidden" in a for a in page.having(class_="slide")), "shown by the script alone"


def test_a_line_is_in_proportion_and_a_gap_is_a_gap() -> None:
    svg = curves("t", "d", [0, 5, 10, 15, 20], [Trail("a", [None, 2.0, None, 4.0, 5.0])], ("x", "y"))
    path, _legend = parts(svg, "path")
    (left, four), (right, five) = points(path)
    width = WIDTH - LEFT - RIGHT
    assert (left, right) == pytest.approx((LEFT + 0.75 * width, LEFT + width), abs=0.06)
    assert BOTTOM - five == pytest.approx(5 / 4 * (BOTTOM - four), abs=0.1), "from 0"
    signs = parts(svg, "circle")
    assert len(signs) == 3 + 1, "the point alone between gaps has its sign, and the legend one"
    assert BOTTOM - float(signs[0].get("cy", "")) == pytest.approx((BOTTOM - five) * 2 / 5, abs=0.1)


def test_zeros_lie_at_the_foot_of_a_whole_axis() -> None:
    svg = curves("t", "d", [1, 2], [Trail("a", [0.0, 0.0])], ("x", "share"), percent=True)
    assert {y for _x, y in points(parts(svg, "path")[0])} == {BOTTOM}
    assert "100%" in [each.text for each in parts(svg, "text")]


def test_chance_is_dashed_and_a_bound_thin() -> None:
    trails = [Trail("a", [1, 2]), Trail("c", [1, 1], 0, "chance"), Trail("c, b", [2, 2], 1, "chance")]
    svg = curves("t", "d", [1, 2], [*trails, Trail("b", [3, 3], 0, "bound")], ("x", "share"), percent=True)
    drawn = parts(svg, "path")[:4]
    one, two, bound, line = drawn
    assert one.get("stroke-dasharray") and two.get("stroke-dasharray") not in (None, one.get("stroke-dasharray"))
    assert not bound.get("stroke-dasharray") and not line.get("stroke-dasharray")
    assert float(bound.get("stroke-width", "")) < float(line.get("stroke-width", ""))
    assert "300%" in [each.text for each in parts(svg, "text")]
    assert {kind(HITS, name) for name in HITS.lines} == {"line", "chance", "bound"}
    assert kind(HITS, "chance, again") == "chance" and kind(HITS, "chances") == "line" == kind(GAPS, "chance")


@pytest.mark.parametrize(
    ("x", "logarithmic"),
    [([1, 2, 4, 8], True), ([2, 4, 8, 16], True), ([1, 2, 3, 4], False), ([0, 1, 10, 100], False), ([1, 4], False)],
)
def test_an_axis_is_logarithmic_where_x_multiply(x: Sequence[float], logarithmic: bool) -> None:
    scale, low, high = across(x), x[0], x[-1]
    shares = [(log(v / low) / log(high / low)) if logarithmic else (v - low) / (high - low) for v in x]
    assert scale.log == logarithmic
    assert [scale(v) for v in x] == pytest.approx([LEFT + share * (WIDTH - LEFT - RIGHT) for share in shares])


def test_ticks_are_whole_where_x_are_and_never_touch() -> None:
    for x in ([0, 1, 2], list(range(64)), [2**power for power in range(18)], [1.0, 1.001, 1.002, 90.0], [7]):
        svg = curves("t", "d", x, [Trail("a", [1.0] * len(x))], ("x", "y"))
        below = [each for each in parts(svg, "text") if each.get("text-anchor") == "middle"][:-1]
        places = [float(each.get("x", "")) for each in below]
        assert places and all(b - a >= 44 for a, b in pairwise(places))
        if len(x) == 64:
            assert [each.text for each in below] == ["0", "10", "20", "30", "40", "50", "60"]


@given(st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=8, unique=True), max_size=6))
def test_a_name_has_one_colour_and_a_curve_no_colour_twice(groups: list[list[str]]) -> None:
    drawn = [Curve("t", "x", "y", [1], {name: [1.0] for name in names} | {"by chance": [0]}, "by chance")
             for names in groups]  # fmt: skip
    found = numbered(drawn, {"c": 0, "d": 1})
    assert found.keys() == {name for names in groups for name in names}, "chance has none"
    assert all(len({found[name] for name in names}) == len(names) for names in groups)
    assert found.get("c", 0) == 0 and found.get("d", 1) == 1


def test_sixty_lines_look_different() -> None:
    trails = [Trail(str(place), [1.0], place) for place in range(60)]
    signs = [each for each in parts(curves("t", "d", [1], trails, ("x", "y")), "g") if each.get("stroke")]
    looks = {
        (each.get("fill"), each.get("stroke"), each[0].tag, len(each[0].get("points", "").split())) for each in signs
    }
    assert len(looks) == 60


def test_the_same_name_looks_the_same_on_the_whole_page(text: str) -> None:
    looks: dict[str, set[str | None]] = {}
    for svg in drawings(text):
        for entry in parts(svg, "g"):
            if entry[0].tag.endswith("title") and entry.get("stroke") is None:
                looks.setdefault(entry[0].text or "", set()).add(entry[1].get("stroke"))
    assert {"LRU", "Belady", "contiguous", "replicated", "dropped", "this trace"} <= looks.keys()
    assert all(len(strokes) == 1 for strokes in looks.values()), looks


def test_long_tables_lose_rows_and_curves_nothing(analysis: Analysis) -> None:
    rows = tuple((str(row), *[row / 7] * 9) for row in range(6_000))
    x = list(range(200))
    curve = Curve("t", "x", "y", x, {f"line {line}": [line + value / 7 for value in x] for line in range(20)})
    long = Finding("cache", "h", tuple("abcdefghij"), (*rows, ("mean", *[1.0] * 9)), (curve, curve))
    text = render(Report(analysis, findings={name: [long, long] for name in ("encoder", "decoder")}))
    assert len(text) < LIMIT
    sections = re.findall(r'<section class="panel what-if">.*?</section>', text, re.DOTALL)
    assert len(sections) == 4 and "What if, encoder" in text
    for section in sections:
        (told,) = re.findall(r"<summary>Table: (\d+) of 6001 rows, evenly spaced</summary>", section)
        assert section.count("<tr>") == int(told) + 1 > 100 and "<td>0</td>" in section and "<td>mean</td>" in section
        assert len(section.split("<details>")[1]) < 160_000
        data = json.loads(Reader(section).having(class_="moving")[0]["data-curve"] or "")
        assert len(data["x"]) == 200 and len(data["lines"]) == 20


def test_hostile_text_arrives_as_text(text: str) -> None:
    page = Reader(text)
    words = " ".join(page.words)
    assert HOSTILE[0] in words and HOSTILE[1] in words and "\\x1b[31m" in words and "\x1b" not in text
    assert not any(tag in ("img", "b") for tag, _ in page.elements)
    name = json.loads(page.having(class_="moving")[1]["data-curve"] or "")["lines"][1][0]
    assert name.startswith(HOSTILE[0]) and len(name) < 70


def test_advice_comes_first_and_only_where_there_is_any(analysis: Analysis, report: Report) -> None:
    words = " ".join(Reader(render(Report(analysis, advice=ADVICE))).words)
    for told in ("Do <b>nothing</b>.", "Keep 4 & more.", "One at a time.", "moectl <x>"):
        assert told in words
    assert words.index("Do <b>") < words.index("Over the layers") and "What if" not in words
    full = " ".join(Reader(render(replace(report, findings={}))).words)
    assert "What the advice rests on" in full and INTRODUCTION in full
    plain = render(Report(analysis))
    assert "<h2>Advice" not in plain and "What if" not in plain and 'class="moving"' not in plain


def test_a_curve_of_one_place_or_none_has_no_slider(analysis: Analysis) -> None:
    one = Curve("One", "x", "y", [3], {"a": [0.0], "c": [1.0]}, "c")
    none = Curve("None", "x", "y", [], {"a": []})
    unknown = Curve("Unknown", "x", "y", [1, 2], {"a": [None, nan], "c": [None, 1.0]}, "c")
    found = Finding("all-to-all", "h", ("a",), (), (one, none, unknown))
    text = render(Report(analysis, findings={"decoder": [found]}))
    assert len(drawings(text)) == 2 and len(Reader(text).having(class_="slide")) == 1
    for svg in drawings(text):
        sound(svg)
    assert "<h3>One: a 0 at 3, where chance gives 1</h3>" in text and "<h3>Unknown</h3>" in text


@pytest.fixture(scope="module")
def browser(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip(NO_BROWSER)
    folder = tmp_path_factory.mktemp("what-if")
    (folder / "page.html").write_text(text, encoding="utf-8")
    with chromium.Browser(program, folder / "profile") as opened:
        opened.open(folder / "page.html")
        yield opened
        assert opened.complaints == [] and opened.requests == [(folder / "page.html").as_uri()]


def inside(browser: chromium.Browser, expression: str) -> Any:
    """Of the first curve, `HITS`, or the second."""
    return browser.evaluate(f"(([hits, gaps]) => {expression})([...document.querySelectorAll('.moving')])")


def test_a_slider_moves_its_marker_and_says_what_the_lines_are(browser: chromium.Browser) -> None:
    told = "hits.querySelector('.told').textContent"
    assert inside(browser, "hits.querySelector('.told').hidden") is False
    assert inside(browser, told) == "LRU: 60%; Belady (cannot be beaten): 80%; chance: 50%", "furthest from chance"
    assert inside(browser, "hits.querySelector('.marker').getAttribute('visibility')") == "visible"
    browser.click(*point_at(browser, ".moving input"))
    inside(browser, "hits.querySelector('input').focus()")
    browser.press("End")
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert inside(browser, told) == "LRU: 30%; Belady (cannot be beaten): 45%; chance: 25%"
    assert inside(browser, "hits.querySelector('output').textContent") == "2"
    assert inside(browser, "hits.querySelector('input').getAttribute('aria-valuetext')") == "2"
    moved = float(inside(browser, "hits.querySelector('.marker').getAttribute('transform')").split("(")[1].split()[0])
    assert moved == pytest.approx(across(HITS.x)(2), abs=0.06)
    assert "LRU: no value" in inside(browser, "gaps.querySelector('.told').textContent")
    inside(
        browser,
        "[gaps.querySelector('input').value = 1, gaps.querySelector('input').dispatchEvent(new Event('input'))]",
    )
    assert inside(browser, "gaps.querySelector('.told').textContent").startswith("LRU: 2,000; </script>")
    assert inside(browser, "hits.querySelector('output').textContent") == "2", "each has its own"
