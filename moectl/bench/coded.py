"""Random ternary experts to measure with: coded as `moectl compress qmoe` codes them, dense, and in 8 bits.

Weights are independent, `ZEROS` of them zero, + as likely as -.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_kernels.ternary import TernaryExperts
from moectl.bench.device import cache_bytes, free_bytes
from moectl.bench.shapes import Shape
from moectl.codecs.encoding import encode
from moectl.codecs.tables import choose, table
from moectl.errors import MachineError
from moectl.report.output import size

ZEROS = 0.9
MOST_COPIES = 8
DRAWN = 2


@dataclass(frozen=True)
class Stack:
    """The same matrix of all experts.

    Attributes:
        copies: coded, as often as it takes to outgrow the cache twice.
        dense: [E, R, N] in the dtype that is measured.
        whole, scale: rounded to 8 bits [E, R, N], and what they count in each row [E, R].
    """

    copies: list[TernaryExperts]
    dense: Tensor
    whole: Tensor
    scale: Tensor

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.dense[0].numel()

    @property
    def nbytes(self) -> float:
        """Of one expert, as little as there is to read: codewords, counts of 16 bits, levels."""
        coded = self.copies[0]
        return (coded.codes.nbytes + 2 * (len(coded.offsets) - 1) + coded.levels_ER2.nbytes) / coded.experts


def make_stacks(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Stack, Stack]:
    """The up- and the down-projections.

    Raises:
        MachineError: they do not fit into memory.
    """
    need = shape.weights * (dtype.itemsize + 1.2)
    if need > 0.8 * (free := free_bytes(device)):
        raise MachineError(
            f"The experts of {shape.name} take {size(int(need))}: dense, in 8 bits and ternary.",
            f"The {device.type} has {size(free)} free.",
            "Use --tp-size, a smaller shape or a narrower dtype.",
        )
    d, f, draw = shape.hidden_size, shape.intermediate_size, np.random.default_rng(seed)
    up, down = (_stack(shape.num_experts, *size, dtype, device, draw) for size in ((2 * f, d), (d, f)))
    return up, down


def _stack(
    experts: int, rows: int, width: int, dtype: torch.dtype, device: torch.device, draw: np.random.Generator
) -> Stack:
    """Random matrices; signs are drawn for a few experts, whose codewords others repeat at places of their own."""
    dense = torch.empty(experts, rows, width, dtype=dtype, device=device)
    whole = torch.empty(experts, rows, width, dtype=torch.int8, device=device)
    level = (draw.random((experts, rows, 2), np.float32) + 0.5) * [-1, 1] / (width * (1 - ZEROS)) ** 0.5
    levels = torch.from_numpy(level).to(device, dtype)
    scale = levels.abs().amax(-1) / 127
    number, drawn = choose(ZEROS), []
    for _ in range(min(experts, DRAWN)):
        share = draw.random((rows, width), np.float32)
        trits = (share < (1 - ZEROS) / 2).astype(np.int8) - (share > (1 + ZEROS) / 2)
        drawn.append((trits, *(torch.from_numpy(part) for part in encode(trits, table(number)))))
    signs, codes, counts = zip(*(drawn[expert % len(drawn)] for expert in range(experts)), strict=True)
    for expert in range(experts):
        sign = torch.from_numpy(signs[expert]).to(device)
        dense[expert] = torch.where(sign > 0, levels[expert, :, 1:], torch.where(sign < 0, levels[expert, :, :1], 0))
        whole[expert] = (dense[expert].float() / scale[expert, :, None]).round().clamp(-127, 127)
    entries = torch.from_numpy(table(number).entries).to(device)
    coded = TernaryExperts.of(torch.cat(codes).to(device), torch.stack(counts).to(device), levels, entries, width)
    copies = max(1, min(MOST_COPIES, math.ceil(2 * cache_bytes(device) / coded.nbytes)))
    return Stack([coded, *(_copy(coded) for _ in range(copies - 1))], dense, whole, scale)


def _copy(coded: TernaryExperts) -> TernaryExperts:
    names = ("codes", "offsets", "levels_ER2")
    return replace(coded, **{name: getattr(coded, name).clone() for name in names})
