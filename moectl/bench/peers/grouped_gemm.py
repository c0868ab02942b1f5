"""grouped_gemm, github.com/tgale96/grouped_gemm, between torch's own permutes. Written from documentation, not run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, Unavailable, need_cuda


def build(weights: Weights) -> Layer:
    """`gmm` twice over rows sorted by expert; it takes the rows per expert from host memory."""
    from grouped_gemm.ops import gmm  # type: ignore[import-not-found]

    need_cuda(weights)
    gate_up, down, shape = weights.gate_up_EGD, weights.down_EDF, weights.shape
    if gate_up.dtype != torch.bfloat16:
        raise Unavailable("it takes bfloat16 only")

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        order = index_TK.flatten().argsort(stable=True)
        sizes = torch.bincount(index_TK.flatten(), minlength=shape.num_experts).cpu()
        gate, up = gmm(x_TD[order // shape.top_k], gate_up, sizes, trans_b=True).chunk(2, dim=-1)
        out_SD = gmm(functional.silu(gate) * up, down, sizes, trans_b=True)
        by_token = torch.zeros_like(out_SD).index_copy(0, order, out_SD).view(*index_TK.shape, -1)
        return (weight_TK[..., None] * by_token).sum(1)

    return Layer(call, (gate_up, down))
