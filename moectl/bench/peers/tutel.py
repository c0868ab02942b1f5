"""Tutel (arXiv 2206.03382): tokens encoded into [E, capacity, D], batched products, decoded.

Written from documentation, not run. Its capacity is that of the fullest expert, so nothing is
dropped, and skew costs what it costs there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """Its fast dispatcher around two bmm."""
    from tutel import moe  # type: ignore[import-not-found]

    need_cuda(weights)
    gate_up, down, shape = weights.gate_up_EGD, weights.down_EDF, weights.shape

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        flat = index_TK.flatten()
        order = flat.argsort(stable=True)
        starts = torch.searchsorted(flat[order], torch.arange(shape.num_experts, device=flat.device))
        place = torch.empty_like(flat)
        place[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        columns = [
            [t[:, k].contiguous() for k in range(shape.top_k)] for t in (index_TK, place.view_as(index_TK), weight_TK)
        ]
        dispatcher = moe.fast_dispatcher(shape.num_experts, 0, shape.hidden_size, x_TD.dtype)
        dispatcher.update(*columns, capacity=int(place.max()) + 1)
        encoded = dispatcher.encode(x_TD).view(shape.num_experts, -1, shape.hidden_size)
        gate, up = torch.bmm(encoded, gate_up.mT).chunk(2, dim=-1)
        out: Tensor = dispatcher.decode(torch.bmm(functional.silu(gate) * up, down.mT).flatten(0, 1))
        return out

    return Layer(call, (gate_up, down))
