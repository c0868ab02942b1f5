"""Every family and pair moectl knows. A new one is its own file and a line here."""

from __future__ import annotations

from moectl.errors import InputError, UsageError
from moectl.families import mixtral, qwen2_moe, qwen3_moe
from moectl.families.llama import LLAMA
from moectl.families.mistral import MISTRAL
from moectl.families.mixtral import MIXTRAL
from moectl.families.qwen2 import QWEN2
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.qwen3 import QWEN3
from moectl.families.qwen3_moe import QWEN3_MOE
from moectl.families.spec import DenseFamily, MoeFamily, Pair

DENSE: dict[str, DenseFamily] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
MOE: dict[str, MoeFamily] = {family.model_type: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)}
PAIRS: tuple[Pair, ...] = (*mixtral.PAIRS, *qwen2_moe.PAIRS, *qwen3_moe.PAIRS)


def find_pair(dense: str, into: str | None) -> Pair:
    """The pair of a dense model_type and a MoE model_type, or the dense family's first when `into` is None.

    Raises:
        InputError: the dense family is not one that can be upcycled.
        UsageError: it cannot become `into`.
    """
    pairs = [pair for pair in PAIRS if pair.dense == dense]
    if not pairs:
        known = ", ".join(sorted({pair.dense for pair in PAIRS}))
        raise InputError(
            f"model_type {dense!r} cannot be upcycled.",
            "No MoE family is known that computes the same.",
            f"Known: {known}.",
        )
    for pair in pairs:
        if into is None or pair.moe == into:
            return pair
    targets = ", ".join(pair.moe for pair in pairs)
    raise UsageError(f"{dense} cannot become {into!r}.", "", f"It can become: {targets}.")
