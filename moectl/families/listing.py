"""The families and pairs as rows of text, for `moectl families` and the reference page."""

from __future__ import annotations

from moectl.families.refused import REFUSED
from moectl.families.registry import DENSE, MOE, PAIRS
from moectl.families.spec import FusedMlp


def listing() -> list[dict[str, str]]:
    """One row per pair that is exact: what a dense family becomes, and what that family can hold."""
    rows = []
    for pair in PAIRS:
        moe = MOE[pair.moe]
        rows.append(
            {
                "dense": pair.dense,
                "becomes": pair.moe,
                "architecture": f"{DENSE[pair.dense].architecture} -> {moe.architecture}",
                "experts on disk": "fused" if isinstance(moe.mlp, FusedMlp) else "one tensor each",
                "shared expert": "yes" if moe.shared else "no",
                "dense layers": "any" if moe.dense_layers else "every second" if moe.encoder else "none",
            }
        )
    return rows


def refusals() -> list[dict[str, str]]:
    """One row per pair that is known not to be the same function, with the reason."""
    return [{"dense": dense, "not": moe, "because": reason} for (dense, moe), reason in REFUSED.items()]
