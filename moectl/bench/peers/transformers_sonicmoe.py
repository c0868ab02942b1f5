"""transformers' experts implementation "sonicmoe", whose kernels the library `kernels` fetches from the Hub.

The kernels have not been run by us: they need a network and a Hopper GPU.
"""

from __future__ import annotations

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda
from moectl.bench.peers.experts_module import layer


def build(weights: Weights) -> Layer:
    """The module with "sonicmoe"; what it lacks it says itself when it is first called."""
    need_cuda(weights)
    return layer(weights, "sonicmoe")
