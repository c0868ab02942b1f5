"""The kernels of ternary experts against float64: every table, ragged and empty rows, any grouping of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import guarded
from ternary_properties import Layer, Matrices, check_decode, check_layer, check_matvec

from moe_kernels import GPT_OSS, RELU2, ternary, tuning
from moe_kernels.gpu import ternary as kernels
from moectl.codecs.tables import QMOE, RATIOS

SHAPES = {
    "small": Matrices(),
    "one by one": Matrices(1, 1, 1, 0.5),
    "no weights": Matrices(2, 3, 0),
    "a codeword beyond the end": Matrices(2, 3, 300, zeros=0.99),
    "all zeros": Matrices(2, 3, 1000, zeros=1.0),
    "long rows": Matrices(1, 3, 14336),
    "more rows than a tile": Matrices(1, 40, 33, zeros=0.7),
    "bfloat16": Matrices(dtype=torch.bfloat16),
    "half": Matrices(dtype=torch.float16, width=333),
    **{f"table {number}": Matrices(2, 4, 90, 0.7, number) for number in (QMOE, *RATIOS)},
}


@pytest.fixture(autouse=True)
def small_tiles() -> Any:
    """128 lanes, as few as a GPU has, so that rows and matrices are longer than a tile."""
    with mock.patch.dict(tuning.TERNARY, interpreter=tuning.Ternary(lanes=128)):
        yield


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str) -> None:
    check_decode(SHAPES[name], "cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_matvec(name: str) -> None:
    check_matvec(SHAPES[name], "cpu", [expert for expert in (1, 0, -1, 1, 5) if expert != 1 or name != "long rows"])


@pytest.mark.parametrize(
    "ids",
    [[0], [2, 2], [1, 1, 1, 1], [1, 0, 1, 1, 2, 1, 1], [0] * 9 + [1] + [0] * 8, [-1, 3, -1], [2, 2**32 + 2, -(2**63)]],
)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_tokens_that_share_a_tile(ids: list[int], block: int) -> None:
    """Rows of one expert are served together, wherever they stand, and each exactly once."""
    choice = tuning.Ternary(lanes=1024, tokens=block)
    with mock.patch.dict(tuning.TERNARY, interpreter=choice):
        check_matvec(Matrices(rows=4, width=30), "cpu", ids, strided=block == 4)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 200),
    st.floats(0.0, 1.0),
    st.one_of(st.none(), st.integers(0, 255)),
    st.lists(st.integers(-1, 3), min_size=1, max_size=6),
)
def test_any_matrices(experts: int, rows: int, width: int, zeros: float, number: int | None, ids: list[int]) -> None:
    case = Matrices(experts, rows, width, zeros, number)
    check_decode(case, "cpu")
    check_matvec(case, "cpu", ids)


TINY = Layer(tokens=3, hidden=12, width=6, experts=3)
LAYERS = {
    "swiglu": TINY,
    "biases, another rank's": replace(TINY, bias=True, foreign=True),
    "gpt-oss": replace(TINY, activation=GPT_OSS, interleaved=True, bias=True),
    "no gate": replace(TINY, activation=RELU2, top_k=1),
    "somebody's own": replace(TINY, activation=lambda h: h[..., :6].tanh() * h[..., 6:], post_norm=True, foreign=True),
    "one token": replace(TINY, tokens=1, bias=True),
    "no tokens": replace(TINY, tokens=0),
    "bfloat16": replace(TINY, dtype=torch.bfloat16, bias=True),
}


@pytest.mark.parametrize("rows", [0, 8], ids=["by matrices", "by rows"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, rows: int) -> None:
    choice = tuning.Ternary(lanes=1024, rows_of_an_expert=rows)
    with (
        mock.patch.dict(tuning.TERNARY, interpreter=choice),
        mock.patch.object(kernels, "forward", wraps=kernels.forward) as fused,
    ):
        check_layer(LAYERS[name], "cpu")
    assert fused.call_count == int(rows > 0 and name != "somebody's own") or name == "no tokens"


def test_gradients() -> None:
    check_layer(replace(TINY, bias=True), "cpu", gradients=True)


def test_one_expert_at_a_time() -> None:
    choice = tuning.Ternary(lanes=1024, rows_of_an_expert=0)
    with mock.patch.dict(tuning.TERNARY, interpreter=choice), mock.patch.dict(ternary.WORKSPACE, cpu=1):
        check_layer(replace(TINY, bias=True, foreign=True), "cpu")


def test_damaged_codewords_stay_within_bounds() -> None:
    """Random codewords, and a sum of lengths that is anything: the guard bands survive."""
    coded, _ = Matrices().coded("cpu")
    codes = torch.randint(0, 1 << 16, (len(coded.codes),), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    with guarded():
        assert ternary.decode(replace(coded, codes=codes)).isfinite().all()
        assert ternary.matvec(replace(coded, codes=codes), torch.ones(1, 70), torch.tensor([1])).isfinite().all()


def test_a_lost_carry_is_seen() -> None:
    """Where every tile of a row starts at its first column again, long rows are wrong."""
    honest = kernels.read_phrases

    def forgetful(codes_ptr, table_ptr, at, end, start, BLOCK_C):  # type: ignore[no-untyped-def]
        low, high, starts, _ = honest.fn(codes_ptr, table_ptr, at, end, start, BLOCK_C)
        return low, high, starts, start

    case = Matrices(1, 3, 2000)
    with mock.patch.object(kernels, "read_phrases", forgetful):
        with pytest.raises(AssertionError):
            check_decode(case, "cpu")
        with pytest.raises(AssertionError):
            check_matvec(case, "cpu", [0])
