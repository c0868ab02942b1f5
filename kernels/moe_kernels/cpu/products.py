"""One expert's matrix times its rows on a CPU: which of torch's products is fastest for how many rows.

Measured on one Zen 4 core with MKL and oneDNN as torch 2.13 ships them, the weights not in cache, time of torch.mm = 1:

    float32, 1 row          0.6 to 0.9   as a batch of two products (MKL's matrix-vector product reads memory badly)
    float32, 2 or 3 rows    0.4 to 0.8   as W x^T
    up to STREAMED_ROWS     0.65 to 1    after reading a matrix that fits the cache once in its own order, which the
                                         hardware prefetches; the reordering of W^T in a product is bound by latency
    float32, larger or more 0.8 to 0.95  in oneDNN instead of MKL
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

# A second-level cache: a larger matrix would be gone from it again when its product starts.
CACHE_BYTES = 1 << 20
# From here on the product itself takes longer than what streaming saves.
STREAMED_ROWS = 48
ONEDNN_ROWS = 64


class Matrices:
    """All experts' matrices of one projection: weight [E, N, D] of any strides, bias [E, N] or None."""

    def __init__(self, weight_END: Tensor, bias_EN: Tensor | None = None, few: bool = False) -> None:
        """`few`: hardly any expert will be asked for, so it does not pay to make the views of all at once."""
        self.weight, self.bias, self.few = weight_END, bias_EN, few
        self.count, self.outputs, self.inputs = weight_END.shape
        self.bytes_each = self.outputs * self.inputs * weight_END.element_size()
        self.rows_contiguous = weight_END.is_contiguous()
        self.float32 = weight_END.dtype == torch.float32
        self.onednn = self.float32 and self.rows_contiguous and torch.backends.mkldnn.is_available()

    def product(self, expert: int, x_nD: Tensor, out_nN: Tensor) -> None:
        """out = x W_e^T + b_e for at least one row."""
        weight_ND, n = self.weights[expert], len(x_nD)
        if self.float32 and n == 1 and self.rows_contiguous and self.outputs % 2 == 0:
            halves = weight_ND.view(2, -1, self.inputs)
            torch.bmm(halves, x_nD.mT.expand(2, -1, -1), out=out_nN.view(2, -1, 1))
        elif self.onednn and (n >= ONEDNN_ROWS or self.bytes_each > CACHE_BYTES):
            out_nN.copy_(torch.ops.mkldnn._linear_pointwise(x_nD, weight_ND, None, "none", [], ""))
        elif self.float32 and n in (2, 3) and self.rows_contiguous:
            out_nN.copy_(torch.mm(weight_ND, x_nD.mT).mT)
        else:
            if n <= STREAMED_ROWS and self.bits is not None:
                self.bits[expert].amax()
            torch.mm(x_nD, self.transposed[expert], out=out_nN)
        if self.bias is not None:
            out_nN += self.bias[expert]

    def products(self, first: int, sizes: Sequence[int], x_SD: Tensor, out_SN: Tensor) -> None:
        """The products of neighbouring experts, from `first` on, with `sizes` rows each in x and in out."""
        for expert, (n, x, out) in enumerate(zip(sizes, x_SD.split(sizes), out_SN.split(sizes), strict=True), first):
            if n:
                self.product(expert, x, out)

    @cached_property
    def weights(self) -> Tensor | Sequence[Tensor]:
        """[N, D] of each expert."""
        return self.weight if self.few else self.weight.unbind(0)

    @cached_property
    def transposed(self) -> Tensor | Sequence[Tensor]:
        """[D, N] of each expert."""
        return self.weight.mT if self.few else self.weight.mT.unbind(0)

    @cached_property
    def bits(self) -> Tensor | Sequence[Tensor] | None:
        """Each matrix as a vector of integers, the quickest to read; None if it need not be read."""
        words = self.bytes_each % 8 == 0 and self.weight.data_ptr() % 8 == 0
        if not (self.rows_contiguous and words and self.bytes_each <= CACHE_BYTES):
            return None
        if torch.get_num_threads() > 1 and not self.float32:  # they would share one cache's worth: 1.1 times slower
            return None
        bits = self.weight.view(self.count, -1).view(torch.int64)
        return bits if self.few else bits.unbind(0)


def grouped_mm(x_SD: Tensor, weight_END: Tensor, offsets: Tensor, out_rows: int) -> Tensor:
    """x W_e^T for rows that are grouped by expert.

    Args:
        x_SD: rows by place; expert e has the places offsets[e]..offsets[e+1].
        weight_END: [E, N, D], any strides.
        offsets: [E+1] integers.
        out_rows: S, rows of the result.

    Returns:
        [S, N]; zero from place offsets[E] on.
    """
    bounds = offsets.tolist()
    matrices = Matrices(weight_END)
    out_SN = x_SD.new_empty(out_rows, matrices.outputs)
    out_SN[bounds[-1] :] = 0
    matrices.products(0, sizes(bounds), x_SD[: bounds[-1]], out_SN[: bounds[-1]])
    return out_SN


def grouped_outer(dy_SN: Tensor, x_SD: Tensor, offsets: Tensor, weight_like_END: Tensor) -> Tensor:
    """dW_e = dy_e^T x_e over the rows of each expert.

    Args:
        dy_SN, x_SD: rows by place; expert e has the places offsets[e]..offsets[e+1], later ones are not read.
        offsets: [E+1] integers.
        weight_like_END: what the result has the shape, type and strides of.

    Returns:
        [E, N, D]; zero for an expert without rows.
    """
    bounds = offsets.tolist()
    dweight_END = torch.empty_like(weight_like_END)
    outer_products(0, sizes(bounds), dy_SN[: bounds[-1]], x_SD[: bounds[-1]], dweight_END)
    clear_idle(dweight_END, sizes(bounds))
    return dweight_END


def outer_products(first: int, sizes: Sequence[int], dy_SN: Tensor, x_SD: Tensor, dweight_END: Tensor) -> None:
    """dweight_e = dy_e^T x_e for neighbouring experts, from `first` on, with `sizes` rows each, if any."""
    for expert, (n, dy, x) in enumerate(zip(sizes, dy_SN.split(sizes), x_SD.split(sizes), strict=True), first):
        if n:
            torch.mm(dy.T, x, out=dweight_END[expert])


def clear_idle(dweight_END: Tensor, sizes: Sequence[int]) -> None:
    """Zero for experts without rows: most often few, so that it would be a waste to begin with zero everywhere."""
    expert = 0
    for busy, run in groupby(sizes, key=bool):
        start, expert = expert, expert + len(list(run))
        if not busy:
            dweight_END[start:expert].zero_()


def sizes(bounds: Sequence[int]) -> list[int]:
    """Rows per expert from where each one starts."""
    return [end - start for start, end in pairwise(bounds)]
