"""How the pipeline goes about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from moectl.compress.dense import DensePart

BATCH_EXPERTS = 16
"""Experts whose Hessians are in memory at once, as in QMoE (arXiv 2310.16795, section 4.2)."""
CAP = 4.0
"""An expert's Hessian is of at most so many times the mean number of tokens (ibid.)."""
MIN_TOKENS = 32
MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Settings:
    """What decides the result, and where it is computed.

    Attributes:
        dense: rounds what is not an expert's; None leaves it as it is.
        batch_experts: how many experts are quantised at once.
        min_tokens: experts that were given fewer are rounded to nearest.
        cap: tokens of one expert that are looked at, as a multiple of the mean.
        all_experts: every expert is shown every token, up to the cap.
        gate_weighted: tokens count as much as their gate (MoEQuant, arXiv 2505.03804, AGQ).
        micro_batch: sequences that run at once; None takes about `MICRO_BATCH_TOKENS` tokens.
        dtype, device: what the model is computed in, and where.
    """

    dense: DensePart | None = None
    batch_experts: int = BATCH_EXPERTS
    min_tokens: int = MIN_TOKENS
    cap: float = CAP
    all_experts: bool = False
    gate_weighted: bool = False
    micro_batch: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def sequences(self, length: int) -> int:
        """How many sequences of so many tokens run at once."""
        return self.micro_batch or max(1, MICRO_BATCH_TOKENS // length)

    def to_json(self) -> dict[str, Any]:
        """All that the codes follow from."""
        return {
            "dense": repr(self.dense),
            "batch_experts": self.batch_experts,
            "min_tokens": self.min_tokens,
            "cap": self.cap,
            "all_experts": self.all_experts,
            "gate_weighted": self.gate_weighted,
            "micro_batch": self.micro_batch,
            "dtype": str(self.dtype),
            "device": torch.device(self.device).type,
        }
