"""transformers' experts implementation "batched_mm": copies the weights of every routed row."""

from __future__ import annotations

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer
from moectl.bench.peers.experts_module import layer


def build(weights: Weights) -> Layer:
    """The module with "batched_mm"; a call copies gate and up, the larger of its two copies, per routed row."""
    shape = weights.shape
    per_row = 2 * shape.hidden_size * shape.intermediate_size * weights.gate_up_EGD.itemsize
    return layer(weights, "batched_mm", lambda tokens: tokens * shape.top_k * per_row)
