"""Routers on a GPU choose what they choose on a CPU, with the fused kernel and without it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from routers_cases import CASES, Case

from moectl.routers.protocol import Context
from moectl.routers.registry import find

pytest.importorskip(
    "numba", reason="on a CPU the largest are found by numba, which a machine with a GPU may be without"
)

FUSED = ["mixtral", "olmoe", "gpt-oss", "llama4", "deepseek-moe", "deepseek-v2", "deepseek-v3", "loss-free", "switch"]
cases = pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])


def moved(context: Context) -> Context:
    """Its tensors on the GPU, and a generator of that GPU."""
    values: dict[str, Any] = {field.name: getattr(context, field.name) for field in fields(context)}
    values = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return Context(**{**values, "generator": torch.Generator("cuda").manual_seed(0)})


@cases
def test_a_gpu_chooses_what_a_cpu_does(case: Case) -> None:
    """In float64, so that no rounding decides."""
    router, given = case.router(torch.float64), case.given(64, dtype=torch.float64)
    expected = case.run(router, given, case.context(64))
    found = case.run(router.cuda(), given.cuda(), moved(case.context(64)))
    assert torch.equal(found.index_TK.cpu(), expected.index_TK)
    torch.testing.assert_close(found.weight_TK.cpu(), expected.weight_TK, atol=1e-9, rtol=1e-9)


@cases
def test_training_draws_on_the_gpu(case: Case) -> None:
    context = replace(moved(case.context(33)), training=True, progress=0.5)
    found = case.run(case.router().cuda(), case.given(33).cuda(), context)
    assert found.weight_TK.is_cuda and found.weight_TK.isfinite().all() and found.aux_loss.isfinite()


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernel_routes_as_plain_torch(name: str) -> None:
    """float32 on the GPU against float64 on the CPU, with gradients to the scores."""
    kind, scores_TE = find(name).load(), torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    gradients, routings = [], []
    for scores in (scores_TE.double().requires_grad_(), scores_TE.cuda().requires_grad_()):
        routing = kind(None, 64).to(scores.device).route(scores, Context())
        mix_TK = torch.linspace(-1, 1, routing.weight_TK.numel(), dtype=torch.float64).view(routing.weight_TK.shape)
        gradients.append(torch.autograd.grad((routing.weight_TK * mix_TK.to(routing.weight_TK)).sum(), scores)[0])
        routings.append(routing)
    assert torch.equal(routings[1].index_TK.cpu(), routings[0].index_TK)
    torch.testing.assert_close(routings[1].weight_TK.cpu().double(), routings[0].weight_TK, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[1].cpu().double(), gradients[0], atol=1e-5, rtol=1e-4)
