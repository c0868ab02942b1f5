"""`moectl bench routers`: a row for each router, its balance and drops as they are, and a peer that does the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from moectl.bench import markdown, page, routers, tables
from moectl.bench.shapes import Shape
from moectl.bench.sweep import Settings
from moectl.cli.main import app
from moectl.errors import UsageError
from moectl.routers.protocol import Context
from moectl.routers.registry import find, names

SOME = "mixtral,switch:cf=1,expert-choice,x-moe,longcat"


@pytest.fixture
def settings() -> Settings:
    layer = Shape(32, 16, 16, 2, name="small")
    return Settings([layer], [48], ["fwd"], ["float32"], [SOME], device="cpu", threads=1, seconds=0.001)


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in document["rows"]}


def test_speed_balance_and_drops(settings: Settings) -> None:
    told: list[str] = []
    found = rows(routers.measure(settings, told.append))
    assert list(found) == ["mixtral", "mixtral, plain torch", "switch:cf=1", "expert-choice", "x-moe", "longcat"]
    assert told == ["small float32 48"] and all(row["reason"] is None for row in found.values())
    for row in found.values():
        assert row["tokens_per_s"] == pytest.approx(48_000 / row["p50_ms"])
    assert found["mixtral"]["imbalance"] == found["mixtral, plain torch"]["imbalance"] > 1
    assert found["mixtral"]["speedup"] == pytest.approx(
        found["mixtral, plain torch"]["p50_ms"] / found["mixtral"]["p50_ms"]
    )
    assert found["expert-choice"]["imbalance"] == 1
    assert found["switch:cf=1"]["dropped"] > 0.1 and found["switch:cf=1"]["imbalance"] < found["mixtral"]["imbalance"]
    assert found["mixtral"]["dropped"] == found["x-moe"]["dropped"] == 0


def test_every_router_is_measured_or_says_why(settings: Settings) -> None:
    """16 experts are too few for one of them, which goes by blocks of 32."""
    document = routers.measure(replace(settings, backends=[], tokens=[3], seconds=1e-4))
    found = rows(document)
    assert set(names()) <= set(found)
    assert {name for name, row in found.items() if row["reason"]} == {"sparse-is-enough"}
    assert tables.missing(document) == ["sparse-is-enough: ValueError: 16 experts are not in blocks of 32"]


@pytest.mark.parametrize("name", routers.FUSED)
def test_the_peer_in_plain_torch_computes_the_same(name: str) -> None:
    kind = find(name).load()
    router, scores_TE = kind(None, 64), torch.randn(40, 64)
    if isinstance(bias_E := getattr(router, "bias", None), torch.Tensor):
        bias_E.normal_(std=0.1)
    expected = router.route(scores_TE, Context())
    index_TK, weight_TK = routers.plain(router, scores_TE, *routers.FUSED[name])
    assert torch.equal(index_TK, expected.index_TK)
    torch.testing.assert_close(weight_TK, expected.weight_TK)


def test_tables_pages_and_documents(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    document = routers.measure(settings) | {"command": "moectl bench routers"}
    ((title, columns, lines),) = tables.short(document)
    assert title == "small float32, 48 tokens" and [line[0] for line in lines] == list(rows(document))
    assert all(len(line) == len(columns) for line in lines)
    assert "times as fast as plain torch" in tables.finding(document)
    assert "| small | float32 | 48 | expert-choice |" in markdown.table(document)
    assert "largest over mean load" in page.render(document)
    only = ["--router", "hash", "--shape", "32,16,8,2", "--tokens", "5", "--time", "0.001", "--device", "cpu", "--json"]
    app(["bench", "routers", *only, "--quiet"], standalone_mode=False)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["backend"] == "hash" and row["model"] == "32,16,8,2"


@pytest.mark.parametrize("text", ["nobody", "mixtral:wings=2", "mixtral:top_k=many", "mot", "soft-moe"])
def test_what_cannot_be_asked_for(settings: Settings, text: str) -> None:
    with pytest.raises(UsageError):
        routers.measure(replace(settings, backends=[text]))
