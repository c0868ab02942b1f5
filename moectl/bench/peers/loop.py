"""The loop over experts of moe_kernels.reference: the yardstick everybody can read."""

from __future__ import annotations

from moe_kernels import reference
from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer


def build(weights: Weights) -> Layer:
    """The reference in the dtype of the weights."""
    gate_up, down = weights.gate_up_EGD, weights.down_EDF
    return Layer(lambda x, index, weight: reference.expert_mlp(x, gate_up, down, index, weight), (gate_up, down))
