"""moe_kernels.expert_mlp: what this project is about."""

from __future__ import annotations

from moe_kernels import expert_mlp, target, tuning
from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer


def build(weights: Weights) -> Layer:
    """The expert layer as users call it."""
    gate_up, down = weights.gate_up_EGD, weights.down_EDF

    def block_m(rows: int) -> int | None:
        if not gate_up.is_cuda:
            return None
        from moe_kernels.gpu import decode

        small = decode.fits(rows // weights.shape.top_k, weights.shape.top_k, weights.shape.num_experts)
        if small and not gate_up.requires_grad:
            return None  # these kernels go row by row
        return tuning.choose(target.of(gate_up), rows, weights.shape.num_experts).block_m

    return Layer(lambda x, index, weight: expert_mlp(x, gate_up, down, index, weight), (gate_up, down), block_m=block_m)
