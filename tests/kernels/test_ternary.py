"""Ternary experts on a CPU: numba's loops and the torch reference against float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_properties import Layer, Matrices, check_decode, check_layer, check_matvec

from moe_kernels import GPT_OSS, RELU2, ternary
from moe_kernels.cpu import ternary as compiled
from moectl.codecs.tables import QMOE, RATIOS

SHAPES = {
    "small": Matrices(),
    "one by one": Matrices(1, 1, 1, 0.5),
    "no weights": Matrices(2, 3, 0),
    "no rows": Matrices(2, 0, 5),
    "a codeword beyond the end": Matrices(width=300, zeros=0.99),
    "dense": Matrices(zeros=0.4),
    "all zeros": Matrices(width=1000, zeros=1.0),
    "long rows": Matrices(1, 4, 14336),
    "bfloat16": Matrices(dtype=torch.bfloat16),
    "half": Matrices(dtype=torch.float16, width=333),
    **{f"table {number}": Matrices(number=number, zeros=0.8) for number in (QMOE, *RATIOS)},
}
IDS = [1, 0, -1, 2, 1, 3, 1, 1]


@pytest.fixture(params=["numba", "torch"])
def way(request: Any) -> Any:
    """Both ways of a CPU."""
    if request.param == "numba":
        yield
        return
    with mock.patch.object(ternary, "find_spec", lambda name: None):
        yield


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str, way: None) -> None:
    check_decode(SHAPES[name], "cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_matvec(name: str, way: None) -> None:
    check_matvec(SHAPES[name], "cpu", [expert for expert in IDS if expert < SHAPES[name].experts])


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 40])
def test_blocks_of_tokens(tokens: int) -> None:
    check_matvec(Matrices(), "cpu", [1] * tokens + [2], strided=tokens == 9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 700),
    st.floats(0.0, 1.0),
    st.one_of(st.none(), st.integers(0, 255)),
    st.lists(st.integers(-1, 4), min_size=1, max_size=20),
)
def test_any_matrices(experts: int, rows: int, width: int, zeros: float, number: int | None, ids: list[int]) -> None:
    case = Matrices(experts, rows, width, zeros, number)
    check_decode(case, "cpu")
    check_matvec(case, "cpu", ids)


def test_no_experts_are_asked_for() -> None:
    coded, _ = Matrices().coded("cpu")
    assert ternary.decode(coded, torch.empty(0, dtype=torch.int64)).shape == (0, 11, 70)
    assert ternary.matvec(coded, torch.empty(0, 70), torch.empty(0, dtype=torch.int64)).shape == (0, 11)


def test_threads_give_the_same_bits() -> None:
    coded, _ = Matrices(rows=101, width=500).coded("cpu")
    x, ids = torch.randn(5, 500), torch.tensor([0, 2, 2, 1, 2])
    alone = ternary.matvec(coded, x, ids), ternary.decode(coded)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    pool = mock.patch("moe_kernels.cpu.compiled.ThreadPoolExecutor", wraps=ThreadPoolExecutor)
    try:
        with mock.patch.object(compiled, "WORTH_A_THREAD", 1), pool as started:
            together = ternary.matvec(coded, x, ids), ternary.decode(coded)
    finally:
        torch.set_num_threads(before)
    assert [call.args for call in started.call_args_list] == [(3,), (3,)]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


LAYERS = {
    "swiglu": Layer(),
    "biases, another rank's": Layer(bias=True, foreign=True, tokens=9),
    "gpt-oss": Layer(activation=GPT_OSS, interleaved=True, bias=True),
    "no gate": Layer(activation=RELU2),
    "somebody's own": Layer(activation=lambda h: h[..., :20].tanh() * h[..., 20:], post_norm=True, foreign=True),
    "one token": Layer(tokens=1),
    "no tokens": Layer(tokens=0),
    "bfloat16": Layer(dtype=torch.bfloat16, bias=True),
    "half": Layer(dtype=torch.float16),
    "float64": Layer(dtype=torch.float64, bias=True),
}


@pytest.mark.parametrize("rows", [0, 512], ids=["by matrices", "by rows"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, rows: int, way: None) -> None:
    with mock.patch.object(compiled, "FEW", {2: rows, 4: rows, 8: 0}):
        check_layer(LAYERS[name], "cpu")


@pytest.mark.parametrize("name", ["swiglu", "biases, another rank's", "bfloat16"])
def test_gradients(name: str) -> None:
    check_layer(LAYERS[name], "cpu", gradients=True)


def test_one_expert_at_a_time() -> None:
    """The room for decoded matrices changes nothing but how many there are at once."""
    case = Layer(bias=True, foreign=True, tokens=9)
    with (
        mock.patch.dict(ternary.WORKSPACE, cpu=1),
        mock.patch.object(compiled, "FEW", {4: 0}),
        mock.patch.object(ternary, "expert_mlp", wraps=ternary.expert_mlp) as calls,
    ):
        check_layer(case, "cpu")
    assert [len(call.args[1]) for call in calls.call_args_list] == [1] * case.experts


def test_autocast() -> None:
    up, _ = Matrices(2, 8, 12).coded("cpu")
    down, _ = Matrices(2, 12, 4).coded("cpu")
    x, index, weight = torch.randn(3, 12), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    narrow = ternary.ternary_mlp(x.bfloat16(), up.to(torch.bfloat16), down.to(torch.bfloat16), index, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = ternary.ternary_mlp(x, up, down, index, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), narrow)


@pytest.mark.parametrize("way", ["numba", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_sign_is_seen(dtype: torch.dtype, way: None) -> None:
    """One flipped bit in the entries of the table: both checks fail."""
    case = Matrices(dtype=dtype)
    honest = ternary.TernaryExperts.of

    def wrong(codes: torch.Tensor, counts: torch.Tensor, levels: torch.Tensor, table: torch.Tensor, width: int) -> Any:
        return honest(codes, counts, levels, table ^ 1 << 57, width)

    with mock.patch.object(ternary.TernaryExperts, "of", wrong):
        with pytest.raises(AssertionError):
            check_decode(case, "cpu")
        with pytest.raises(AssertionError):
            check_matvec(case, "cpu", IDS)


def test_damaged_codewords_write_nowhere_else(way: None) -> None:
    """Random codewords, too many and too few of them: something comes out, and nothing around it is touched."""
    generator = torch.Generator().manual_seed(0)
    coded, _ = Matrices(rows=30).coded("cpu")
    codes = torch.randint(0, 1 << 16, (len(coded.codes),), generator=generator).to(torch.uint16)
    short = torch.arange(len(coded.offsets)).clamp(max=40)
    for bad in (replace(coded, codes=codes), replace(coded, offsets=short, codes=codes)):
        whole = torch.full((5, 30, 70), 7.0)
        found = ternary.decode(bad, out=whole[1:4])
        assert whole[0].eq(7).all()
        assert whole[4].eq(7).all()
        values = torch.cat((torch.zeros(3, 30, 1), coded.levels_ER2), -1)
        assert (found[..., None] == values[:, :, None]).any(-1).all()
        assert ternary.matvec(bad, torch.ones(3, 70), torch.arange(3)).isfinite().all()
