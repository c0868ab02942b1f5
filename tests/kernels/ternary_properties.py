"""What the ternary kernels promise, as checks that take a device; the CPU, the interpreter and a GPU are given them.

The truth is in float64, from the weights before they were coded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from properties import TOLERANCE, error, guarded
from torch import Tensor

from moe_kernels import SWIGLU, Activation, reference
from moe_kernels.ternary import TernaryExperts, decode, matvec, ternary_mlp
from moectl.codecs.blob import pack
from moectl.codecs.tables import table

BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Matrices:
    """A stack of random ternary matrices; `number` of the code table, None for the one that suits."""

    experts: int = 3
    rows: int = 11
    width: int = 70
    zeros: float = 0.9
    number: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def coded(self, device: str) -> tuple[TernaryExperts, Tensor]:
        """The coded matrices, and their weights [E, R, N]: first a row of zeros, one without -, one without +."""
        draw = np.random.default_rng(self.seed)
        shape = (self.experts, self.rows, self.width)
        trits = draw.choice(
            np.array([-1, 0, 1], np.int8), shape, p=((1 - self.zeros) / 2, self.zeros, (1 - self.zeros) / 2)
        )
        trits[:, :1] = 0
        trits[:, 1:2] = np.maximum(trits[:, 1:2], 0)
        trits[:, 2:3] = np.minimum(trits[:, 2:3], 0)
        levels = torch.from_numpy(draw.standard_normal((*shape[:2], 2))).to(self.dtype)
        blob = pack(trits, np.zeros((*shape[:2], 2), ml_dtypes.bfloat16), number=self.number)
        parts = (blob.codes, blob.counts, table(blob.number).entries)
        codes, counts, entries = (torch.from_numpy(part).to(device) for part in parts)
        low, high = (levels[..., side : side + 1].expand(shape) for side in (0, 1))
        sign = torch.from_numpy(trits)
        weights = torch.where(sign > 0, high, torch.where(sign < 0, low, torch.zeros((), dtype=self.dtype)))
        return TernaryExperts.of(codes, counts, levels.to(device), entries, self.width), weights.to(device)


def check_decode(case: Matrices, device: str) -> None:
    """Bit-equal, with +0 for zeros, any experts in any order; nothing else is written."""
    coded, weights = case.coded(device)
    bits = BITS[case.dtype.itemsize]
    with guarded():
        found = decode(coded)
    assert torch.equal(found.view(bits), weights.view(bits))
    which = torch.tensor([case.experts - 1, -1, 0, case.experts, 0], device=device)
    with guarded():
        out = torch.empty(len(which), case.rows, case.width, dtype=case.dtype, device=device).fill_(7)
        assert decode(coded, which, out) is out
    for expert, matrix in zip(which.tolist(), out, strict=True):
        there = 0 <= expert < case.experts
        assert torch.equal(matrix.view(bits), weights[expert].view(bits)) if there else (matrix == 7).all()


def check_matvec(case: Matrices, device: str, ids: list[int], strided: bool = False) -> None:
    """Equal to the products in float64; zeros, whatever x is, for an id that is no expert's."""
    coded, weights = case.coded(device)
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(len(ids), case.width, generator=generator).to(device, case.dtype)
    x = x.T.contiguous().T if strided else x
    expert = torch.tensor(ids, device=device)
    foreign = (expert < 0) | (expert >= case.experts)
    x[foreign] = float("nan")
    with guarded():
        found = matvec(coded, x, expert)
    known = torch.where(foreign, 0, expert)
    truth = (weights[known].double() @ torch.nan_to_num(x).double()[..., None]).squeeze(-1)
    truth[foreign] = 0
    assert found.dtype == case.dtype
    assert found[foreign].eq(0).all()
    assert error(found, truth) <= TOLERANCE[case.dtype]


@dataclass(frozen=True)
class Layer:
    """One expert layer of ternary matrices; ids of another rank where `foreign`."""

    tokens: int = 5
    top_k: int = 2
    hidden: int = 24
    width: int = 20
    experts: int = 4
    activation: Any = SWIGLU
    interleaved: bool = False
    bias: bool = False
    post_norm: bool = False
    foreign: bool = False
    dtype: torch.dtype = torch.float32


def check_layer(case: Layer, device: str, gradients: bool = False) -> None:
    """Equal to the reference in float64 on the weights themselves; so are the gradients to tokens and routing."""
    gated = not isinstance(case.activation, Activation) or case.activation.gated
    up_rows = 2 * case.width if gated else case.width
    shape = Matrices(case.experts, up_rows, case.hidden, 0.8, dtype=case.dtype)
    (up, up_weights), (down, down_weights) = (
        one.coded(device) for one in (shape, replace(shape, rows=case.hidden, width=case.width, seed=1))
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, case.dtype)

    x, weight = normal(case.tokens, case.hidden), normal(case.tokens, case.top_k)
    index = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k).indices.to(device)
    if case.foreign:
        index[::3, -1] = case.experts + 1
        index[1::4, 0] = -1
    options: dict[str, Any] = {"activation": case.activation, "interleaved": case.interleaved}
    if case.post_norm:
        options["post_norm"] = lambda rows: torch.nn.functional.rms_norm(rows, rows.shape[-1:], eps=1e-3)
    biases = (normal(case.experts, up_rows), normal(case.experts, case.hidden)) if case.bias else (None, None)
    leaves = [tensor.detach().requires_grad_(gradients) for tensor in (x, weight)]
    wide = [tensor.detach().double().requires_grad_(gradients) for tensor in (x, weight)]
    with guarded():
        names = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
        found = ternary_mlp(leaves[0], up, down, index, leaves[1], **names, **options)
    names = {f"{name}_{shape}": bias for (name, bias), shape in zip(names.items(), ("EG", "ED"), strict=True)}
    names = {name: None if bias is None else bias.double() for name, bias in names.items()}
    truth = reference.expert_mlp(
        wide[0], up_weights.double(), down_weights.double(), index, wide[1], **names, **options
    )
    assert found.dtype == case.dtype
    assert error(found, truth) <= TOLERANCE.get(case.dtype, 1e-7)
    if gradients:
        upstream = torch.linspace(-1, 2, found.numel(), device=device).view_as(found)
        ours = torch.autograd.grad(found, leaves, upstream.to(case.dtype))
        theirs = torch.autograd.grad(truth, wide, upstream.double())
        assert all(error(one, other) <= 2 * TOLERANCE[case.dtype] for one, other in zip(ours, theirs, strict=True))
