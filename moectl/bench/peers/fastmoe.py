"""FastMoE (arXiv 2103.13262): scatter, one linear per expert, gather. Written from documentation, not run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """Its autograd functions for one process; rows per expert live in host memory."""
    from fmoe.functions import MOEGather, MOEScatter  # type: ignore[import-not-found]
    from fmoe.linear import MOELinear  # type: ignore[import-not-found]

    need_cuda(weights)
    gate_up, down, shape = weights.gate_up_EGD, weights.down_EDF, weights.shape

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        flat = index_TK.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=shape.num_experts).cpu()
        rows = len(order)
        x_SD = MOEScatter.apply(x_TD, order // shape.top_k, sizes, sizes, rows, 1)
        gate, up = MOELinear.apply(x_SD, sizes, gate_up, None).chunk(2, dim=-1)
        out_SD = MOELinear.apply((functional.silu(gate) * up).contiguous(), sizes, down, None)
        by_row = MOEGather.apply(out_SD, order, sizes, sizes, rows, 1)
        return torch.bmm(weight_TK[:, None], by_row.view(*index_TK.shape, -1)).squeeze(1)

    return Layer(call, (gate_up, down))
