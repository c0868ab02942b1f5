"""Experts whose matrices are ternary and coded below one bit a weight: decoded whole, or multiplied as they are.

A row is a string of 16-bit codewords. A codeword names an entry of a table, and the entry is a phrase of the row:
byte 0 is the number of its weights, bytes 1 to 6 are the places of those that are not zero, 255 where there is no
more, and bit i of byte 7 is set where the one of byte 1 + i is +. So one load decodes a codeword, and a prefix sum over
lengths tells where each one starts. A phrase may reach beyond the end of its row, but only with zeros.

Legend: E experts, R rows of a matrix (outputs), N weights in a row (inputs), C codewords; T tokens, K top-k, S = T*K
routed rows, D hidden_size, F expert width, G rows of the up-projection (2F with a gate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_kernels import target
from moe_kernels.activations import SWIGLU, Activation
from moe_kernels.experts import expert_mlp

SLOTS = 6
UNUSED = 255
WORKSPACE = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Bytes of matrices that are decoded at a time, at least one expert's. On a CPU the first touch of new memory takes
longer than decoding into it, so there it is little, and used again for the next expert."""


@dataclass(frozen=True)
class TernaryExperts:
    """The same matrix of all experts, coded.

    Attributes:
        codes: uint16 [C], all rows one after another.
        offsets: int64 [E*R + 1]; row r of expert e has the codewords offsets[e*R + r]..offsets[e*R + r + 1].
        levels_ER2: what - and + stand for in each row.
        table: int64 [65536], the entry of each codeword.
        width: N.
        slots: the most weights other than zero that an entry has; fewer mean less work.
    """

    codes: Tensor
    offsets: Tensor
    levels_ER2: Tensor
    table: Tensor
    width: int
    slots: int = SLOTS

    @classmethod
    def of(cls, codes: Tensor, counts_ER: Tensor, levels_ER2: Tensor, table: Tensor, width: int) -> TernaryExperts:
        """From how many codewords each row has, of any integer type. On a GPU it waits for the table, once."""
        offsets = torch.zeros(counts_ER.numel() + 1, dtype=torch.int64, device=codes.device)
        torch.cumsum(counts_ER.reshape(-1).long(), 0, out=offsets[1:])
        used = sum((table[table != 0] >> 8 * slot + 8 & 255 != UNUSED).any().int() for slot in range(SLOTS))
        return cls(codes, offsets, levels_ER2, table, width, int(used))

    @property
    def experts(self) -> int:
        """E."""
        return self.levels_ER2.shape[0]

    @property
    def rows(self) -> int:
        """R."""
        return self.levels_ER2.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the levels, and so of the weights."""
        return self.levels_ER2.dtype

    @property
    def codes_of_a_row(self) -> float:
        """The mean number of codewords of a row."""
        return len(self.codes) / max(1, len(self.offsets) - 1)

    @property
    def nbytes(self) -> int:
        """What codewords, offsets and levels take; the table is shared by all matrices."""
        return self.codes.nbytes + self.offsets.nbytes + self.levels_ER2.nbytes

    def to(self, *where: Any) -> TernaryExperts:
        """On a device; or with levels of a dtype."""
        if isinstance(where[0], torch.dtype):
            return replace(self, levels_ER2=self.levels_ER2.to(*where))
        names = ("codes", "offsets", "levels_ER2", "table")
        return replace(self, **{name: getattr(self, name).to(*where) for name in names})


def decode(experts: TernaryExperts, which: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The matrices [A, R, N] of the experts `which` [A], all of them by default: exact, with +0 for every zero.

    An id outside 0..E-1 leaves its matrix as it was. `out` is contiguous and has the type of the levels.
    """
    if which is None:
        which = torch.arange(experts.experts, device=experts.codes.device)
    chosen = implementation(experts)
    if out is None:
        out = chosen.empty(experts, len(which))
    chosen.decode(experts, which, out)
    return out


def matvec(experts: TernaryExperts, x_SN: Tensor, expert_S: Tensor) -> Tensor:
    """y_s = W_e x_s with e = expert_s [S, R], in the type of x; zeros for an id outside 0..E-1.

    Sums are in float32, and no weight is written anywhere.
    """
    y_SR = x_SN.new_empty(len(x_SN), experts.rows)
    implementation(experts).matvec(experts, x_SN, expert_S, y_SR)
    return y_SR


def ternary_mlp(
    x_TD: Tensor,
    up: TernaryExperts,
    down: TernaryExperts,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    activation: Activation | Callable[[Tensor], Tensor] = SWIGLU,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    post_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`expert_mlp` with ternary matrices, `up` of [E, G, D] and `down` of [E, D, F].

    Few rows an expert are multiplied with the codewords; for more, or where a gradient is wanted (to everything but the
    matrices), experts are decoded, about WORKSPACE bytes of them at a time, and `expert_mlp` does the rest.

    Arguments, result and errors as `expert_mlp` has them.
    """
    dtype, kind = up.dtype, x_TD.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        up, down = up.to(dtype), down.to(dtype)
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (gate_up_bias, down_bias))
    x = x_TD.to(dtype)
    given = (x, weight_TK, gate_up_bias, down_bias)
    learning = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    call = Call(x, up, down, index_TK, weight_TK, activation, gate_up_bias, down_bias, interleaved, post_norm)
    if learning or not implementation(up).few(call):
        return call.by_matrices(learning).to(x_TD.dtype)
    if target.uses_triton(x) and isinstance(activation, Activation) and post_norm is None:
        from moe_kernels.gpu import ternary

        return ternary.forward(call, activation).to(x_TD.dtype)
    return call.by_rows().to(x_TD.dtype)


@dataclass(frozen=True)
class Call:
    """One call of `ternary_mlp`, its tensors in one type."""

    x_TD: Tensor
    up: TernaryExperts
    down: TernaryExperts
    index_TK: Tensor
    weight_TK: Tensor
    activation: Activation | Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    interleaved: bool
    post_norm: Callable[[Tensor], Tensor] | None

    def by_rows(self) -> Tensor:
        """Products with the codewords, a row of each choice at a time."""
        tokens, top_k = self.index_TK.shape
        expert_S = self.index_TK.reshape(-1)
        known = (expert_S >= 0) & (expert_S < self.up.experts)
        expert_S = torch.where(known, expert_S, -1)
        h_SG = matvec(self.up, self.x_TD.repeat_interleave(top_k, 0), expert_S)
        if self.gate_up_bias is not None:
            h_SG = h_SG + self.gate_up_bias[expert_S]
        act = self.activation
        a_SF = act(h_SG, self.interleaved) if isinstance(act, Activation) else act(h_SG)
        y_SD = matvec(self.down, a_SF.to(h_SG.dtype), expert_S)
        if self.down_bias is not None:
            y_SD = y_SD + self.down_bias[expert_S]
        if self.post_norm is not None:
            y_SD = self.post_norm(y_SD)
        y_SD = torch.where(known[:, None], y_SD.float(), 0.0)
        return torch.bmm(self.weight_TK[:, None].float(), y_SD.view(tokens, top_k, self.down.rows)).squeeze(1)

    def by_matrices(self, learning: bool) -> Tensor:
        """`expert_mlp` on decoded matrices, as many experts at a time as WORKSPACE holds; gradients keep them all."""
        experts, device = self.up.experts, self.x_TD.device
        known = (self.index_TK >= 0) & (self.index_TK < experts)
        key_TK = torch.where(known, self.index_TK, experts).long()
        hit = torch.zeros(experts + 1, dtype=torch.bool, device=device).index_fill_(0, key_TK.view(-1), True)[:-1]
        # Which experts have rows is asked where nobody waits for the answer; elsewhere -1 stands for those without.
        numbers = hit.nonzero().squeeze(1) if device.type == "cpu" else torch.arange(experts, device=device)
        size = (self.up.rows * self.up.width + self.down.rows * self.down.width) * self.up.dtype.itemsize
        chunks = numbers.split(max(1, WORKSPACE.get(device.type, WORKSPACE["cuda"]) // max(1, size)))
        room_up, room_down = (
            None if learning else implementation(stack).empty(stack, len(chunks[0])) for stack in (self.up, self.down)
        )
        y_TD = torch.zeros_like(self.x_TD, dtype=torch.float32)
        for chunk in chunks:
            which = torch.where(hit[chunk], chunk, -1)
            place = torch.full((experts + 1,), -1, device=device)
            place[chunk] = torch.arange(len(chunk), device=device)
            biases = (None if bias is None else bias[chunk] for bias in (self.gate_up_bias, self.down_bias))
            gate_up_bias, down_bias = biases
            up = decode(self.up, which, room_up if room_up is None else room_up[: len(chunk)])
            down = decode(self.down, which, room_down if room_down is None else room_down[: len(chunk)])
            y = expert_mlp(
                self.x_TD, up, down, place[key_TK], self.weight_TK,
                activation=self.activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
                interleaved=self.interleaved, post_norm=self.post_norm,
            )  # fmt: skip
            y_TD = y if len(chunks) == 1 else y_TD + y
        return y_TD


def implementation(experts: TernaryExperts) -> Any:
    """The module whose functions serve the device of these experts."""
    if target.uses_triton(experts.codes):
        from moe_kernels.gpu import ternary

        return ternary
    if experts.codes.device.type == "cpu" and find_spec("numba"):
        from moe_kernels.cpu import ternary as compiled

        return compiled
    return Plain


class Plain:
    """The reference, in torch on any device: one expert after the other."""

    @staticmethod
    def few(call: Call) -> bool:
        """Whether the codewords themselves are multiplied: never, for it would decode them all the same."""
        return False

    @staticmethod
    def empty(experts: TernaryExperts, matrices: int) -> Tensor:
        """Room for so many matrices."""
        return experts.levels_ER2.new_empty(matrices, experts.rows, experts.width)

    @staticmethod
    def decode(experts: TernaryExperts, which: Tensor, out_ARN: Tensor) -> None:
        """See `decode`."""
        for place, expert in enumerate(which.tolist()):
            if 0 <= expert < experts.experts:
                out_ARN[place] = decoded(experts, expert)

    @staticmethod
    def matvec(experts: TernaryExperts, x_SN: Tensor, expert_S: Tensor, y_SR: Tensor) -> None:
        """See `matvec`."""
        y_SR.zero_()
        for expert in expert_S.unique().tolist():
            if 0 <= expert < experts.experts:
                mine = expert_S == expert
                y_SR[mine] = (x_SN[mine].float() @ decoded(experts, expert).float().T).to(y_SR.dtype)


def decoded(experts: TernaryExperts, expert: int) -> Tensor:
    """The matrix of one expert [R, N], by torch's own functions.

    All codewords at once: lengths summed up tell where each phrase starts in the string of all rows, and the sum at the
    start of a row tells what to subtract. What a phrase has beyond the end of its row is dropped.
    """
    rows, width = experts.rows, experts.width
    bounds = experts.offsets[expert * rows : (expert + 1) * rows + 1]
    entry_C = experts.table[experts.codes[int(bounds[0]) : int(bounds[-1])].long()]
    row_C = torch.repeat_interleave(torch.arange(rows, device=entry_C.device), bounds.diff())
    end_C = (entry_C & 255).cumsum(0)
    before = torch.cat((end_C.new_zeros(1), end_C))[bounds[:-1] - bounds[0]]
    start_C = end_C - (entry_C & 255) - before[row_C]
    w_RN = experts.levels_ER2.new_zeros(rows, width)
    for slot in range(SLOTS):
        offset_C = entry_C >> 8 * slot + 8 & 255
        used = (offset_C != UNUSED) & (start_C + offset_C < width)
        row, sign = row_C[used], (entry_C >> slot + 56 & 1)[used]
        w_RN[row, (start_C + offset_C)[used]] = experts.levels_ER2[expert, row, sign]
    return w_RN
