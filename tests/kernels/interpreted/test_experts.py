"""The expert layer's kernels against float64, forward and backward, at the edges of what a batch can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import Case, check_experts, check_frozen, check_repeats, guarded

from moe_kernels import GEGLU, GPT_OSS, RELU2, Activation, expert_mlp, tuning

FOREIGN = Case(routing="foreign", tokens=17)
CASES = {
    "even": Case(),
    "one expert has all rows": Case(routing="one", tokens=40, top_k=1),
    "skewed, experts without rows": Case(routing="skewed", experts=9, tokens=6),
    "fewer rows than experts": Case(tokens=2, experts=33, top_k=3),
    "another rank's experts": FOREIGN,
    "another rank's experts and biases": replace(FOREIGN, bias=True),
    "one of one": Case(experts=1, top_k=1),
    "all of five": Case(top_k=5, tokens=7),
    "wider than a tile": Case(hidden=70, width=65, tokens=9),
    "many rows": Case(tokens=150, experts=3, hidden=16, width=16),
    "bias": Case(bias=True),
    "interleaved": Case(interleaved=True),
    "transposed": Case(transposed=True),
    "gpt-oss": Case(activation=GPT_OSS, interleaved=True, transposed=True, bias=True),
    "geglu": Case(activation=GEGLU),
    "geglu, tanh, clamped": Case(activation=Activation("gelu_tanh", limit=0.4)),
    "relu": Case(activation=Activation("relu")),
    "relu squared, no gate": Case(activation=RELU2, bias=True),
    "silu, no gate": Case(activation=Activation(gated=False)),
    "identity": Case(activation=Activation("identity", gated=False)),
    "somebody's own function": Case(activation=lambda h: h.chunk(2, -1)[0].tanh() * h.chunk(2, -1)[1], bias=True),
    "norm of the experts' outputs": Case(post_norm=True, routing="foreign"),
    "half": Case(dtype=torch.float16, bias=True),
    "bfloat16": Case(dtype=torch.bfloat16, bias=True),
    "bfloat16, somebody's own": Case(dtype=torch.bfloat16, activation=lambda h: h[..., :20] * h[..., 20:].sigmoid()),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients(name: str) -> None:
    check_experts(CASES[name], "cpu")


@pytest.mark.parametrize("case", [Case(), FOREIGN, Case(dtype=torch.bfloat16, tokens=3, experts=16, bias=True)])
def test_without_gradients(case: Case) -> None:
    check_experts(case, "cpu", gradients=False)


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=3, experts=32, hidden=72, width=40),
        Case(tokens=1, experts=9, top_k=4, bias=True, activation=GPT_OSS, interleaved=True, transposed=True),
        Case(tokens=3, experts=24, routing="foreign", dtype=torch.float16),
        Case(tokens=2, experts=16, activation=RELU2),
    ],
)
def test_decoding(case: Case) -> None:
    """The small-batch path, which no gradient takes: seen to be the one that runs."""
    from moe_kernels.gpu import decode

    with mock.patch.object(decode, "forward", wraps=decode.forward) as ran:
        check_experts(case, "cpu", gradients=False)
    assert ran.call_count == 1


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data: Any) -> None:
    experts = data.draw(st.integers(1, 12))
    case = Case(
        tokens=data.draw(st.integers(1, 24)),
        hidden=data.draw(st.integers(1, 24)),
        width=data.draw(st.integers(1, 24)),
        experts=experts,
        top_k=data.draw(st.integers(1, min(experts, 4))),
        routing=data.draw(st.sampled_from(["even", "one", "skewed", "foreign"])),
        bias=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    check_experts(case, "cpu")


def test_no_tokens() -> None:
    y = expert_mlp(
        torch.empty(0, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6), torch.empty(0, 2).long(), torch.empty(0, 2)
    )
    assert y.shape == (0, 8)
    learning = torch.zeros(4, 12, 8, requires_grad=True)
    y = expert_mlp(torch.empty(0, 8), learning, torch.zeros(4, 8, 6), torch.empty(0, 2).long(), torch.empty(0, 2))
    assert torch.autograd.grad(y.sum(), learning)[0].abs().sum() == 0


@pytest.mark.parametrize("case", [Case(bias=True), FOREIGN])
def test_frozen_tensors(case: Case) -> None:
    check_frozen(case, "cpu")


def test_float64_is_refused() -> None:
    inputs = Case(dtype=torch.float64, tokens=9).inputs("cpu")
    t = inputs.tensors
    with pytest.raises(ValueError, match="float64"):
        expert_mlp(t["x"], t["gate_up"], t["down"], inputs.index, t["weight"])


def test_the_same_bits_twice() -> None:
    check_repeats(Case(tokens=30, bias=True), "cpu")


def test_autocast_hands_over_wider_tokens() -> None:
    inputs = Case(dtype=torch.bfloat16).inputs("cpu")
    tensors = inputs.tensors
    wide = tensors["x"].detach().float()
    y = expert_mlp(wide, tensors["gate_up"], tensors["down"], inputs.index, tensors["weight"].float())
    narrow = expert_mlp(tensors["x"], tensors["gate_up"], tensors["down"], inputs.index, tensors["weight"])
    assert y.dtype == torch.float32
    assert torch.equal(y.to(torch.bfloat16), narrow)


TIGHT = replace(GPT_OSS, limit=0.5)
PLANTED = {
    "tanh for erf": (Case(activation=GEGLU), replace(GEGLU, kind="gelu_tanh")),
    "no limit": (Case(activation=TIGHT), replace(TIGHT, limit=None)),
    "no offset": (Case(activation=TIGHT), replace(TIGHT, offset=0.0)),
    "another slope": (Case(activation=TIGHT, dtype=torch.bfloat16), replace(TIGHT, alpha=1.0)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_activation_is_seen(name: str) -> None:
    """The tolerance fails when the kernels are told another activation than the reference."""
    case, wrong = PLANTED[name]
    from moe_kernels.gpu import experts

    told = (wrong.kind, wrong.gated, wrong.limit, wrong.alpha, wrong.offset)
    with mock.patch.object(experts, "constants", lambda _: told), pytest.raises(AssertionError):
        check_experts(case, "cpu", gradients=False)
    check_experts(case, "cpu", gradients=False)


def test_a_lost_row_is_seen() -> None:
    from moe_kernels.gpu import experts

    honest = experts.combine

    def forgetful(y: Any, plan: Any, weight: Any, out: Any) -> Any:
        plan.inverse[3] = -1
        return honest(y, plan, weight, out)

    with mock.patch.object(experts, "combine", forgetful), pytest.raises(AssertionError):
        check_experts(Case(dtype=torch.bfloat16), "cpu")


def test_an_unwritten_output_and_a_guard_band_are_seen() -> None:
    from moe_kernels.gpu import experts

    with mock.patch.object(experts, "combine", lambda y, plan, weight, out: out), pytest.raises(AssertionError):
        check_experts(Case(), "cpu")
    with pytest.raises(AssertionError, match="guard band"), guarded():
        inside = torch.empty(4)
        inside.as_strided((1,), (1,), inside.storage_offset() + 4).fill_(0.0)


def test_a_dot_of_bfloat16_is_right_only_with_the_mend() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16; with that back, the layer fails."""
    import triton.language as tl

    from moe_kernels.gpu import language

    check_experts(CASES["bfloat16"], "cpu", gradients=False)
    with mock.patch.object(language, "INTERPRET", tl.constexpr(False)), pytest.raises(AssertionError):
        check_experts(CASES["bfloat16"], "cpu", gradients=False)


def test_every_line_of_a_table_gives_the_same_result() -> None:
    """Tiles are a matter of speed alone: each packaged line, forced upon one small batch."""
    for line in tuning.packaged("interpreter"):
        with mock.patch.object(tuning, "choose", lambda *_, line=line: line):
            check_experts(Case(tokens=40, bias=True), "cpu")
