"""The kernels on a GPU: the interpreter's properties at real sizes, and what only a device can show: races, graphs.

float32 products are exact here ("ieee"), so the tolerances are those of the interpreter's tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from properties import Case, check_dispatch, check_experts, check_repeats, check_route, error

from moe_kernels import GPT_OSS, RELU2, expert_mlp, reference
from moe_kernels.gpu import decode

LARGE = Case(tokens=2000, hidden=512, width=384, experts=16, top_k=4, dtype=torch.bfloat16)
CASES = {
    "bfloat16": LARGE,
    "half": replace(LARGE, dtype=torch.float16),
    "float32": replace(LARGE, dtype=torch.float32, tokens=500),
    "many experts, few rows": replace(LARGE, experts=128, top_k=8, tokens=100),
    "ragged widths": replace(LARGE, hidden=520, width=200),
    "odd widths": replace(LARGE, hidden=259, width=131),
    "one expert has all rows": replace(LARGE, routing="one"),
    "skewed": replace(LARGE, routing="skewed", experts=61),
    "another rank's experts": replace(LARGE, routing="foreign", bias=True),
    "gpt-oss": replace(LARGE, activation=GPT_OSS, interleaved=True, transposed=True, bias=True),
    "relu squared": replace(LARGE, activation=RELU2),
    "somebody's own": replace(LARGE, activation=lambda h: h[..., :384].tanh() * h[..., 384:], post_norm=True),
    "few tokens": replace(LARGE, tokens=3),
    "rows of 32": replace(LARGE, tokens=128),
    "rows of 64": replace(LARGE, tokens=256),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients(name: str) -> None:
    check_experts(CASES[name], "cuda")


@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("name", ["bfloat16", "many experts, few rows", "gpt-oss"])
def test_decoding(name: str, tokens: int) -> None:
    check_experts(replace(CASES[name], tokens=tokens), "cuda", gradients=False)


@pytest.mark.parametrize(
    "tokens, experts, top_k", [(1, 8, 2), (128, 128, 8), (33_000, 256, 8), (9_999, 60, 4), (5, 3, 1)]
)
def test_dispatch(tokens: int, experts: int, top_k: int) -> None:
    index = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0)).cuda()
    for block_m in (16, 128):
        check_dispatch(index, experts, block_m)


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "groups": 8, "top_groups": 4, "renormalise": True}])
def test_router(options: dict[str, Any]) -> None:
    logits = torch.randn(3000, 256, generator=torch.Generator().manual_seed(0)).cuda()
    check_route(logits, 8, tolerance=5e-6, **options)


def test_the_same_bits_every_time() -> None:
    """A race would show as bits that change from run to run."""
    for _ in range(10):
        check_repeats(LARGE, "cuda")


@pytest.mark.parametrize("tokens", [*decode.BUCKETS, 512])
def test_a_cuda_graph_replays_with_new_inputs(tokens: int) -> None:
    """Nothing waits for the host: captured once, replayed with other tokens and other experts."""
    case = replace(LARGE, tokens=tokens, experts=64)
    inputs = case.inputs("cuda")
    t = {name: tensor.detach() for name, tensor in inputs.tensors.items()}

    def layer() -> torch.Tensor:
        return expert_mlp(t["x"], t["gate_up"], t["down"], inputs.index, t["weight"])

    with torch.no_grad():
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer()
        other = replace(case, seed=1).inputs("cuda")
        t["x"].copy_(other.tensors["x"])
        t["weight"].copy_(other.tensors["weight"])
        inputs.index.copy_(other.index)
        graph.replay()
        torch.cuda.synchronize()
        wide = [t[name].double() for name in ("x", "gate_up", "down")]
        truth = reference.expert_mlp(*wide, inputs.index, t["weight"].double())
    assert error(y, truth) <= 2e-2


def test_compiles_to_one_graph() -> None:
    inputs = LARGE.inputs("cuda")
    y, gradients = inputs.run(torch.compile(expert_mlp, fullgraph=True), ("gate_up_bias", "down_bias"))
    plain, plains = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))
    assert error(y, plain) <= 1e-6
    assert all(error(gradients[name], plains[name]) <= 1e-6 for name in plains)


def test_a_transformers_model_runs_on_the_kernels() -> None:
    """Logits and gradients of a small model equal eager's, on the device."""
    import moectl.integrations.transformers  # noqa: F401
    from moectl.families.tiny import tiny_model

    model = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64).cuda()
    ids = torch.randint(0, 128, (2, 40), device="cuda")
    found = {}
    for name in ("eager", "moectl"):
        model.set_experts_implementation(name)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(found["eager"]) == len(found["moectl"])
    assert all(error(ours, theirs) <= 1e-4 for ours, theirs in zip(found["moectl"], found["eager"], strict=True))
