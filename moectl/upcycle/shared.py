"""The always-active expert beside the routed ones, in families that have one, so that the sum stays the dense FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf

from moectl.checkpoint.expressions import Expression, Literal, Slice
from moectl.errors import UsageError
from moectl.families.registry import MOE, PAIRS
from moectl.families.spec import Ffn, MoeFamily, Pair
from moectl.upcycle.experts import scaled

SILENT_WIDTH = 128
"""Width of the silent shared expert of a family that must have one and lets it be narrow.

Zero would be smaller, and transformers accepts it, but vLLM's qwen2_moe builds no shared expert then and stops at
the (empty) tensors transformers wants to find. 128 divides by every usual tensor-parallel size.
"""

Kind = OneOf["none", "silent", "copy", "residual"]


@dataclass(frozen=True, slots=True)
class Shared:
    """A shared expert (None where the family has none), its gate row, and what routed outputs are multiplied by."""

    ffn: Ffn | None = None
    gate_row: Expression | None = None
    routed_scale: float = 1.0


def shared_kind(pair: Pair, wanted: Kind | None) -> Kind:
    """What the pair's shared expert is: `wanted`, or else what the family has of itself.

    Raises:
        UsageError: one is wanted, and the family has no place for it.
    """
    shared = MOE[pair.moe].shared
    if shared is not None:
        return wanted or shared.default
    if wanted:
        able = [other.moe for other in PAIRS if other.dense == pair.dense and MOE[other.moe].shared]
        into = f"give --into {' or '.join(able)}, or " if able else ""
        raise UsageError(
            f"{pair.moe} has no shared expert, as --shared-experts or --residual need.",
            "Its layers are routed experts alone, so readers would drop the tensors.",
            f"To go on, {into}leave the option out.",
        )
    return "none"


def check_width(kind: Kind, moe: MoeFamily, granularity: int) -> None:
    """Refuse a copy in a family whose shared expert is as wide as one routed expert when these are narrower.

    Raises:
        UsageError: it is one.
    """
    if kind in ("copy", "residual") and granularity > 1 and not {"shared_width", "shared_count"} & set(moe.fields):
        raise UsageError(
            f"--granularity {granularity}: the shared expert of {moe.model_type} is as wide as a routed one.",
            "It stands for the whole FFN, so the experts cannot be narrower than that.",
            "Leave --granularity out, or choose another family with --into.",
        )


def shared_width(kind: Kind, intermediate_size: int) -> int:
    """The shared expert's width; 0 where there is none."""
    return {"none": 0, "silent": min(SILENT_WIDTH, intermediate_size)}.get(kind, intermediate_size)


def shared_expert(kind: Kind, ffn: Ffn, moe: MoeFamily, hidden_size: int, intermediate_size: int) -> Shared:
    """The shared expert of a layer.

    A silent one (its down is zero) is not dead: its gate and up are neurons of the dense FFN, so its down matrix has a
    gradient from the first step. A copy gives half of the output and leaves half to the routed experts: by its down
    matrix, or by its gate, whose row of zeros has sigmoid 0.5. A residual one (PR-MoE, arXiv 2201.05596, section 4.1)
    gives all of it: the routed experts beside it start at zero and learn what to add.
    """
    if moe.shared is None or kind == "none":
        return Shared()
    gate_row = Literal((1, hidden_size), 0.0) if moe.shared.gate_row else None
    if kind == "copy":
        return Shared(ffn if gate_row else scaled(ffn, 0.5), gate_row, routed_scale=0.5)
    if kind == "residual":
        return Shared(scaled(ffn, 2.0) if gate_row else ffn, gate_row, routed_scale=0.0)
    width = shared_width(kind, intermediate_size)
    silent = Ffn(Slice(ffn.gate, 0, 0, width), Slice(ffn.up, 0, 0, width), Literal((hidden_size, width), 0.0))
    return Shared(silent, gate_row)
