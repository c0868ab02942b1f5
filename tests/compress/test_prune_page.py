"""The page about a pruned model: what it says of experts and domains is what the output and the scores say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qmoe_runs import COUNTING, EXPERTS, LAYERS, LETTERS, made_moe, memory, names, texts
from test_qmoe_command import Page
from typer.testing import CliRunner

from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.compress.prune import page
from moectl.compress.prune.layout import Layout, layout_of
from moectl.compress.prune.page import GONE, STAYED, render
from moectl.compress.prune.plan import plan_prune
from moectl.compress.prune.recipe import PruneRecipe
from moectl.compress.prune.scores import Scores
from moectl.data import documents
from moectl.data.documents import EVERY_BUILTIN
from moectl.errors import UsageError
from moectl.evaluation import probe

KEEP = 5
FINE = {
    "loss_before": 2.0,
    "loss_after": 2.1,
    "repeated_before": 0.1,
    "repeated_after": 0.1,
    "surprise_before": 0.5,
    "surprise_after": 0.6,
    "broken": "",
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with memory() as directory:
        made_moe(directory / "moe")
        texts(directory / "counting.jsonl", COUNTING)
        texts(directory / "letters.jsonl", LETTERS)
        yield directory


@pytest.fixture(scope="module")
def layout(place: Path) -> Layout:
    return layout_of(Checkpoint.open(place / "moe"))


def scores(score_LE: Any, **about: Any) -> Scores:
    """As if every expert had been given ten tokens."""
    layers = {
        layer: {"tokens": np.full(EXPERTS, 10.0), "gated_norms": 10 * np.asarray(score_E, float)}
        for layer, score_E in enumerate(score_LE)
    }
    return Scores(layers, {"data": ["mine.jsonl"], "tokens": 240, **about}, "0" * 64)


def planned(layout: Layout, found: Scores) -> Plan:
    return plan_prune(layout, PruneRecipe("reap", keep=KEEP), found)


class Cells(HTMLParser):
    """How many cells of the heat map have each colour."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.colours: Counter[str] = Counter()
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inside = self.inside or given.get("class") == "cells"
        if self.inside and tag == "path":
            self.colours[str(given["fill"])] += str(given["d"]).count("M")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "g"


def test_every_expert_has_a_cell_that_says_whether_it_went(layout: Layout) -> None:
    rising = scores([range(1, EXPERTS + 1)] * LAYERS)
    text = render(planned(layout, rising), rising, {"mine": FINE})
    found = Cells(text).colours
    # Of 1 to 8 three go: 1, 2 and 3 are in the lowest third; 4 and 5 are in the middle one, 6 to 8 in the highest.
    assert found == {GONE[0].colour: 3 * LAYERS, STAYED[1].colour: 2 * LAYERS, STAYED[2].colour: 3 * LAYERS}
    assert f"{3 * LAYERS} of {EXPERTS * LAYERS} experts went" in text
    assert f"{KEEP} of {EXPERTS} experts kept in every layer; loss 2.000 → 2.100" in text
    assert f"<td>{', '.join('012')}</td>" in text and f">{round(100 * 6 / 36, 2)}<" in text
    assert Page(text).fetched == []


def test_what_stands_out_is_said_and_only_that(layout: Layout) -> None:
    even = scores([range(1, EXPERTS + 1)] * LAYERS)
    assert "Nothing: no domain lost much" in render(planned(layout, even), even, {"mine": FINE})
    uneven = scores([[1, 1, 1, 20, 21, 22, 23, 24], [1, 1, 1, 20, 21, 22, 23, 24], [9, 9, 9, 9.01, 9.1, 9.2, 9.3, 9.4]])
    uneven.layers[1]["tokens"][0] = uneven.layers[1]["gated_norms"][0] = 0
    broken = FINE | {"loss_after": 2.5, "broken": "99% of what it writes is repetition, 3% before"}
    text = render(planned(layout, uneven), uneven, {"mine": FINE, "<b>other": broken})
    for words in (
        "Generation breaks on &lt;b&gt;other",
        "Loss on &lt;b&gt;other rose by 25%",
        f"Layer 2 lost {27 / 73.01:.1%} of its score, {3 / 113:.1%} is the median",
        "Layers where it was close: 2",
        "Experts given no token: 1, in layers: 1",
    ):
        assert words in text, words
    assert "rose by 5%" not in text and "built-in text" not in text
    builtin = scores([range(1, EXPERTS + 1)] * LAYERS, data=list(EVERY_BUILTIN))
    text = render(planned(layout, builtin), builtin, {})
    assert "Chosen on built-in text" in text and "Quality was not measured" in text


def test_many_experts_are_pooled(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_CELLS", 3)
    rising = scores([range(1, EXPERTS + 1)] * LAYERS)
    text = render(planned(layout, rising), rising, {})
    assert "A cell stands for 3 neighbouring experts" in text
    assert Cells(text).colours == {GONE[0].colour: LAYERS, STAYED[1].colour: LAYERS, STAYED[2].colour: LAYERS}


@pytest.mark.parametrize("method", ["reap", "aimer", "naee"])
def test_the_command_writes_it(method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", (str(place / "letters.jsonl"),))
    for name, value in {"LENGTH": 40, "GIVEN": 16, "WRITTEN": 12, "TEXTS": 3}.items():
        monkeypatch.setattr(probe, name, value)
    with memory() as room:
        options = ["--keep", str(KEEP), "--method", method, "--samples", "4", "--seq-len", "64", "--json"]
        arguments = ["compress", "prune", str(place / "moe"), "-o", str(room / "out"), *options]
        data = ["--data", str(place / "counting.jsonl"), "--html", str(room / "page.html")]
        done = CliRunner().invoke(app, [*arguments, *data])
        assert done.exit_code == 0, done.exception
        text = (room / "page.html").read_text()
        for domain, found in json.loads(done.stdout)["domains"].items():
            assert f"<td>{domain}</td>" in text and f">{found['loss_after']:.4g}<" in text
        gone = {shade.colour for shade in GONE}
        colours = Cells(text).colours
        assert sum(n for colour, n in colours.items() if colour in gone) == (EXPERTS - KEEP) * LAYERS
        assert names(room) == ["out", "out.statistics", "page.html"]
        refused = CliRunner().invoke(app, [*arguments, "--html", str(room)])
        assert isinstance(refused.exception, UsageError)
