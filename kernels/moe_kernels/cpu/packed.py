"""Expert weights in the order in which oneDNN reads them, for inference with weights that no longer change.

A product with few rows otherwise spends most of its time on that reordering, on every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activations import SWIGLU
from moe_kernels.cpu.layer import Activate, run


class PackedMatrices:
    """All experts' matrices of one projection, packed."""

    def __init__(self, weight_END: Tensor, bias_EN: Tensor | None) -> None:
        self.count, self.outputs, self.inputs = weight_END.shape
        self.packed = [torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), None) for w in weight_END.unbind(0)]
        self.bias = [None] * self.count if bias_EN is None else [b.contiguous() for b in bias_EN.detach().unbind(0)]
        self.nbytes = sum(torch.ops.mkldnn._nbytes(w) for w in self.packed)
        if bias_EN is not None:
            self.nbytes += bias_EN.nbytes

    def product(self, expert: int, x_nD: Tensor, out_nN: Tensor) -> None:
        """out = x W_e^T + b_e for at least one row."""
        out_nN.copy_(torch.ops.mkldnn._linear_pointwise(x_nD, self.packed[expert], self.bias[expert], "none", [], ""))

    def products(self, first: int, sizes: list[int], x_SD: Tensor, out_SN: Tensor) -> None:
        """The products of neighbouring experts, from `first` on, with `sizes` rows each in x and in out."""
        for expert, (n, x, out) in enumerate(zip(sizes, x_SD.split(sizes), out_SN.split(sizes), strict=True), first):
            if n:
                self.product(expert, x, out)


class PackedExperts:
    """The expert layer with packed weights; made by `pack`.

    Attributes:
        nbytes: what the packed weights and biases take. They are another copy: free the originals.
    """

    def __init__(
        self, up: PackedMatrices, down: PackedMatrices, activation: Activate, interleaved: bool, dtype: torch.dtype
    ) -> None:
        self.up, self.down, self.activation, self.interleaved, self.dtype = up, down, activation, interleaved, dtype
        self.nbytes = up.nbytes + down.nbytes

    @torch.no_grad()
    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What `expert_mlp` computes from the weights that were packed, without gradients: [T, D]."""
        x = x_TD.to(self.dtype)
        return run(x, self.up, self.down, index_TK, weight_TK, self.activation, self.interleaved).to(x_TD.dtype)

    __call__ = forward


def pack(
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activate = SWIGLU,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
) -> PackedExperts:
    """Pack the experts' weights; arguments as `expert_mlp` has them.

    The result is meant to replace the originals: it holds a second copy of everything (`nbytes`), does not keep the
    originals alive, and does not follow later changes to them. Free them, or the memory for weights is double.

    Raises:
        ValueError: the weights are not on a CPU, or oneDNN has no product for their type here.
    """
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    for tensor in (gate_up, down):
        _check(tensor)
    with torch.no_grad():
        up, out = PackedMatrices(gate_up, gate_up_bias), PackedMatrices(down, down_bias)
    return PackedExperts(up, out, activation, interleaved, gate_up.dtype)


def _check(weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(f"packed weights are for a CPU, and these are on {weight.device}: move them first")
    supported = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (weight.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    )
    if not supported:
        raise ValueError(
            f"oneDNN cannot pack {weight.dtype} on this machine: call expert_mlp on the weights themselves"
        )
