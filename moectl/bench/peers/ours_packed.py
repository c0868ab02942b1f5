"""moe_kernels.cpu with the weights packed once: inference with frozen weights on a CPU."""

from __future__ import annotations

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, Unavailable


def build(weights: Weights) -> Layer:
    """The packed experts; forward only."""
    from moe_kernels.cpu import pack

    if weights.gate_up_EGD.is_cuda:
        raise Unavailable("it runs on a CPU only")
    packed = pack(weights.gate_up_EGD.detach(), weights.down_EDF.detach())
    return Layer(packed)
