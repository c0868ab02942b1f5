"""triton_kernels of the Triton repository: ragged products with gather and scatter, forward only.

Written from documentation, not run. Its SwiGLU takes gate and up columns interleaved and adds 1 to the up half, so the
activation here is torch's, between the two products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """`matmul` twice over ragged rows: the first gathers its rows by token, the second scatters them back."""
    from triton_kernels.matmul import matmul  # type: ignore[import-not-found]
    from triton_kernels.tensor import make_ragged_tensor_metadata  # type: ignore[import-not-found]

    need_cuda(weights)
    w1, w2, shape = weights.gate_up_EGD.detach().mT, weights.down_EDF.detach().mT, weights.shape

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        flat = index_TK.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.zeros(shape.num_experts, dtype=torch.int32, device=flat.device)
        sizes.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ragged = make_ragged_tensor_metadata(sizes, len(order))
        token = (order // shape.top_k).int()
        gate, up = matmul(x_TD, w1, None, a_ragged_metadata=ragged, gather_indx=token).chunk(2, dim=-1)
        a_SF = functional.silu(gate) * up
        out_SD = matmul(a_SF, w2, None, a_ragged_metadata=ragged, scatter_indx=order.int())
        return torch.bmm(weight_TK[:, None], out_SD.view(*index_TK.shape, -1)).squeeze(1)

    return Layer(call)
