"""Drawings are in proportion to their numbers, start at 0, and draw chance dashed."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from moectl.report.heat import Shade, heat
from moectl.report.plots import Line, Strip, columns, lines
from moectl.report.ribbons import ribbons


def parts(svg: str, tag: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith(f"}}{tag}")]


def test_columns_are_as_high_as_their_values_on_one_scale() -> None:
    strips = [Strip("<a>", [0.1, 0.4], 0.25, [0.05, 0.3], [0.2, 0.5]), Strip("b" * 40, [0.2, 0.0], 0.25)]
    drawn = columns("t", "d", strips, ["0", "1"], ("expert", "share"))
    bars = [element for element in parts(drawn, "rect") if len(element)]
    heights = [float(element.get("height", "")) for element in bars]
    assert heights == pytest.approx([heights[1] / 4, heights[1], heights[1] / 2, 0], abs=0.02)
    assert bars[0][0].text == "<a>, 0: 0.1, chance 0.25"
    assert sum(element.get("stroke-dasharray") is not None for element in parts(drawn, "line")) == 2
    assert "b" * 13 + "…" in [element.text for element in parts(drawn, "text")]


def test_lines_start_at_0_leave_gaps_and_dash_chance() -> None:
    series = [Line("found", [1.0, None, 2.0]), Line("chance", [0.5] * 3, chance=True), Line("unknown", [None] * 3)]
    drawn = lines("t", "d", ["0", "1", "2"], series, ("layer", "share"))
    found, chance = (element for element in parts(drawn, "path"))
    ys = [float(y) for _x, y in re.findall(r"([\d.]+) ([\d.]+)", found.get("d", ""))]
    base = (
        float(next(e.get("y", "") for e in parts(drawn, "text") if e.text == "0" and e.get("text-anchor") == "end")) - 4
    )
    assert base - ys[1] == pytest.approx(2 * (base - ys[0]), abs=0.2)
    assert chance.get("stroke-dasharray") and not found.get("stroke-dasharray")
    assert len(parts(drawn, "circle")) == 2


def test_every_cell_has_the_shade_of_its_level() -> None:
    shades = [Shade("#000000", "none"), Shade("#ffffff", "some"), Shade("#ff0000", "all")]
    drawn = heat("t", "d", [[0, 1, 1], [2, 1, 0]], shades, ["0", "1"], ["a", "b", "c"], ("expert", "layer"))
    counts = {element.get("fill"): element.get("d", "").count("M") for element in parts(drawn, "path")}
    assert counts == {"#000000": 2, "#ffffff": 3, "#ff0000": 1}
    (cells,) = [element for element in parts(drawn, "g") if element.get("class") == "cells"]
    assert float(cells.get("data-width", "")) > 0 and cells.get("data-left") == "76"


def test_ribbons_are_as_wide_as_what_flows() -> None:
    drawn = ribbons("t", "d", ["a", "b"], ["c", "others"], [[3.0, 1.0], [0.0, 4.0]], ("from", "to"))
    widths = [float(re.findall(r"v([\d.]+)", element.get("d", ""))[0]) for element in parts(drawn, "path")]
    assert len(widths) == 3, "nothing flows from b to c"
    assert [width / widths[1] for width in widths] == pytest.approx([3, 1, 4], rel=0.01)
    fills = [element.get("fill") for element in parts(drawn, "path")]
    assert fills[1] == fills[2] != fills[0], "to the pooled ones in grey"
