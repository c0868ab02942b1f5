"""The operators behind torch.compile: their schemas, fake shapes and autograd, and whole graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from properties import Case, error

from moe_kernels import GPT_OSS, SWIGLU, Activation, expert_mlp, experts, grouped, route, router
from moe_kernels.dispatch import Dispatch, dispatch


@pytest.fixture(autouse=True)
def filled() -> Iterator[None]:
    """What a kernel leaves unwritten on purpose (lines of a schedule that name no block) is the same in two runs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def arguments(case: Case) -> tuple[object, ...]:
    inputs = case.inputs("cpu")
    t = inputs.tensors
    a = case.activation
    assert isinstance(a, Activation)
    biases = (t.get("gate_up_bias"), t.get("down_bias"))
    said = (a.kind, a.gated, a.limit, a.alpha, a.offset, case.interleaved)
    return (t["x"], t["gate_up"], t["down"], inputs.index, t["weight"], *biases, *said, True)


@pytest.mark.parametrize("case", [Case(), Case(bias=True, activation=GPT_OSS, interleaved=True)])
def test_experts(case: Case) -> None:
    torch.library.opcheck(experts._operator, arguments(case), test_utils=CHECKS)


def test_grouped_linear_and_combine() -> None:
    inputs = Case(bias=True).inputs("cpu")
    t = inputs.tensors
    plan: Dispatch = dispatch(inputs.index, 5, grouped.block_of(t["x"], inputs.index.reshape(-1), torch.empty(6)))
    parts = (plan.offsets, plan.row, plan.inverse, plan.schedule, plan.n_blocks)
    torch.library.opcheck(grouped._dispatch_operator, (inputs.index, 5), test_utils=CHECKS)
    linear = (t["x"], t["gate_up"], t["gate_up_bias"], *parts, 2, True)
    torch.library.opcheck(grouped._linear_operator, linear, test_utils=CHECKS)
    rows = torch.randn(26, 24, requires_grad=True)
    torch.library.opcheck(grouped._combine_operator, (rows, t["weight"], *parts), test_utils=CHECKS)


def test_route() -> None:
    logits = torch.randn(5, 8, requires_grad=True)
    said = (logits, None, 2, "softmax", 1, 1, "top2", True, 1.0)
    torch.library.opcheck(router._operator, said, test_utils=CHECKS)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(bias=True, interleaved=True),
        Case(post_norm=True),
        Case(activation=lambda h: h[..., :20] * h[..., 20:]),
    ],
)
def test_compiles_to_one_graph(case: Case) -> None:
    """fullgraph: no break; the same output and gradients as without the compiler."""
    inputs = case.inputs("cpu")
    compiled = torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)
    y, gradients = inputs.run(compiled, ("gate_up_bias", "down_bias"))
    plain, plains = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))
    assert torch.equal(y, plain)
    assert all(error(gradients[name], plains[name]) <= 1e-7 for name in plains)


def test_a_router_and_its_experts_compile_to_one_graph() -> None:
    inputs = Case().inputs("cpu")
    t = inputs.tensors

    def block(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        index, weight = route(x @ gate, 2, renormalise=True)
        return expert_mlp(x, t["gate_up"], t["down"], index, weight, activation=SWIGLU)

    gate = torch.randn(24, 5, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(t["x"], gate).sum(), gate)
    assert error(found[0], torch.autograd.grad(block(t["x"], gate).sum(), gate)[0]) <= 1e-6
