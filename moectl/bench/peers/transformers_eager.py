"""transformers' experts implementation "eager"."""

from __future__ import annotations

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer
from moectl.bench.peers.experts_module import layer


def build(weights: Weights) -> Layer:
    """The module with "eager"."""
    return layer(weights, "eager")
