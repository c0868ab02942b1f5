"""MegaBlocks (arXiv 2211.15841), its dropless layer with grouped products. Written from documentation, not run."""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """ParallelDroplessMLP with `mlp_impl="grouped"` and a GLU: w1 gate, v1 up, w2 down, all [E*F, D]."""
    from megablocks.layers.arguments import Arguments  # type: ignore[import-not-found]
    from megablocks.layers.dmoe import ParallelDroplessMLP  # type: ignore[import-not-found]

    need_cuda(weights)
    shape, dtype = weights.shape, weights.gate_up_EGD.dtype
    mlp = ParallelDroplessMLP(
        Arguments(
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.intermediate_size,
            moe_num_experts=shape.num_experts,
            moe_top_k=shape.top_k,
            mlp_type="glu",
            mlp_impl="grouped",
            activation_fn=torch.nn.functional.silu,
            memory_optimized_mlp=False,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            device=weights.gate_up_EGD.device,
        )
    )
    gate, up = weights.gate_up_EGD.detach().chunk(2, dim=1)
    experts = mlp.mlp
    with torch.no_grad():
        experts.w1.copy_(gate.reshape(-1, shape.hidden_size))
        experts.v1.copy_(up.reshape(-1, shape.hidden_size))
        experts.w2.copy_(weights.down_EDF.detach().mT.reshape(-1, shape.hidden_size))

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out: Tensor = mlp.forward_once(x_TD, weight_TK, index_TK)[0]
        return out

    def canonical(dw1: Tensor, dv1: Tensor, dw2: Tensor) -> tuple[Tensor, Tensor]:
        by_expert = [gradient.view(shape.num_experts, -1, shape.hidden_size) for gradient in (dw1, dv1, dw2)]
        return torch.cat(by_expert[:2], dim=1), by_expert[2].mT

    return Layer(call, (experts.w1, experts.v1, experts.w2), canonical)
