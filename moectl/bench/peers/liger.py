"""Liger-Kernel's fused experts (liger-kernel 0.8): SonicMoE's algorithm in Triton.

Written from documentation, not run.
"""

from __future__ import annotations

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """Its autograd function; it takes ids as int32."""
    from liger_kernel.ops import LigerFusedMoEFunction  # type: ignore[import-not-found]

    need_cuda(weights)
    gate_up, down = weights.gate_up_EGD, weights.down_EDF
    return Layer(
        lambda x, index, weight: LigerFusedMoEFunction.apply(x, gate_up, down, index.int(), weight),
        (gate_up, down),
        block_m=lambda _rows: 64,
    )
