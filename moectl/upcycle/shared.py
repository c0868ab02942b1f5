"""The always-active expert beside the routed ones, in families that have one, so that the sum stays the dense FFN."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.checkpoint.expressions import Expression, Literal, Slice
from moectl.families.spec import Ffn, MoeFamily

SILENT_WIDTH = 128
"""Width of the silent shared expert of a family that must have one and lets it be narrow.

Zero would be smaller, and transformers accepts it, but vLLM's qwen2_moe builds no shared expert then and stops at
the (empty) tensors transformers wants to find. 128 divides by every usual tensor-parallel size.
"""


@dataclass(frozen=True, slots=True)
class Shared:
    """A shared expert (None where the family has none), its gate row, and what routed outputs are multiplied by."""

    ffn: Ffn | None = None
    gate_row: Expression | None = None
    routed_scale: float = 1.0


def shared_width(moe: MoeFamily, intermediate_size: int) -> int:
    """The shared expert's width; 0 where the family has none."""
    return min(SILENT_WIDTH, intermediate_size) if moe.shared else 0


def shared_expert(ffn: Ffn, moe: MoeFamily, hidden_size: int, intermediate_size: int) -> Shared:
    """What the family needs beside its routed experts.

    The expert is silent (down is zero) but not dead: its gate and up are neurons of the dense FFN, so its down matrix
    has a gradient from the first step.
    """
    if moe.shared is None:
        return Shared()
    width = shared_width(moe, intermediate_size)
    silent = Ffn(Slice(ffn.gate, 0, 0, width), Slice(ffn.up, 0, 0, width), Literal((hidden_size, width), 0.0))
    return Shared(silent, Literal((1, hidden_size), 0.0) if moe.shared.gate_row else None)
