"""The torch reference is transformers' own expert layer, and a sum over tokens written out."""

from __future__ import annotations

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_kernels.reference import expert_mlp

T, D, F, E, K = 13, 8, 12, 5, 2


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, weight = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((T, D), (E, 2 * F, D), (E, D, F), (T, K))
    )
    index = torch.rand(T, E - 1, generator=generator).topk(K).indices  # expert E-1 gets no token
    return x, gate_up, down, index, weight


def test_equals_transformers() -> None:
    x, gate_up, down, index, weight = inputs(torch.float64)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).double()
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up)
        experts.down_proj.copy_(down)
        expected = experts(x, index, weight)
    assert torch.allclose(expert_mlp(x, gate_up, down, index, weight), expected, rtol=1e-12, atol=1e-12)


def test_equals_the_sum_written_out_and_has_its_gradients() -> None:
    leaves = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs(torch.float64)]
    x, gate_up, down, index, weight = leaves
    rows = []
    for t in range(T):
        row = torch.zeros(D, dtype=torch.float64)
        for k in range(K):
            e = int(index[t, k])
            gate, up = gate_up[e, :F] @ x[t], gate_up[e, F:] @ x[t]
            row = row + weight[t, k] * (down[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    expected = torch.stack(rows)
    found = expert_mlp(x, gate_up, down, index, weight)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(T, D, dtype=torch.float64)
    inputs_with_gradient = (x, gate_up, down, weight)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), inputs_with_gradient),
        torch.autograd.grad((expected * direction).sum(), inputs_with_gradient),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)
