"""What to prune and by what measure: the options of `moectl compress prune`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moectl.errors import UsageError
from moectl.text import shown

if TYPE_CHECKING:
    from moectl.compress.prune.layout import Layout

METHODS = {
    "reap": "mean of gate times output norm over an expert's tokens (arXiv 2510.13999)",
    "frequency": "how many tokens are routed to an expert",
    "ean": "sum of an expert's output norms over its tokens",
    "aimer": "root mean square over mean magnitude of an expert's weights, without data (arXiv 2603.18492)",
    "naee": "the subset that changes the layer's output least, of all subsets (arXiv 2402.14800)",
}
MOST_SUBSETS = 20_000
"""Of a layer that `naee` tries: each is one more run of its router and a sum over experts for every token."""


@dataclass(frozen=True)
class PruneRecipe:
    """How many experts to keep, by which method; one of `ratio` and `keep` is given.

    Attributes:
        ratio: the share of experts to remove; what is removed is rounded down.
        keep: experts to keep in every layer.
    """

    method: str = "reap"
    ratio: float | None = None
    keep: int | None = None
    shard_bytes: int = 5_000_000_000

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is read.

        Raises:
            UsageError: an unknown method, both or neither of ratio and keep, or one out of range.
        """
        if self.method not in METHODS:
            raise UsageError(f"--method {shown(self.method)!r} is not known.", "", f"Give {', '.join(METHODS)}.")
        if (self.ratio is None) == (self.keep is None):
            raise UsageError(
                "One of --ratio and --keep is needed." if self.ratio is None else "--ratio and --keep contradict.",
                "They say how many experts of every layer are to go or to stay.",
                "Give --ratio 0.25 to remove a quarter, or --keep 96.",
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio} is not a share.", "", "Give a number from 0 to below 1.")
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"--keep {self.keep} leaves no expert.", "", "Give a whole number of at least 1.")

    def kept(self, layout: Layout) -> int:
        """How many experts of every layer stay: as many in each group, if the router has groups.

        Raises:
            UsageError: they are fewer than the router needs, more than there are, or no equal number in each group.
        """
        per_group = layout.experts // layout.groups
        if self.keep is not None:
            if self.keep % layout.groups:
                raise UsageError(
                    f"--keep {self.keep} is not a multiple of {layout.groups}.",
                    f"The router chooses among {layout.groups} groups, which must stay equally large.",
                    f"Give a multiple of {layout.groups}.",
                )
            kept = self.keep // layout.groups
        else:
            assert self.ratio is not None
            kept = per_group - math.floor(self.ratio * per_group)
        # Grouped routers rank a group by its two best experts (DeepSeek-V3, arXiv 2412.19437).
        least = max(math.ceil(layout.top_k / layout.top_groups), 2 if layout.groups > 1 else 1)
        if not least <= kept <= per_group:
            raise UsageError(
                f"{kept * layout.groups} of {layout.experts} experts cannot be kept.",
                f"A token is given {layout.top_k} of them"
                + (f", of {layout.top_groups} of {layout.groups} groups." if layout.groups > 1 else "."),
                f"Keep from {least * layout.groups} to {layout.experts}.",
            )
        return kept * layout.groups


def subsets(layout: Layout, kept: int) -> int:
    """How many ways there are to keep so many experts of a layer, as many in each group."""
    return math.comb(layout.experts // layout.groups, kept // layout.groups) ** layout.groups


def check_subsets(layout: Layout, kept: int) -> None:
    """Refuse `naee` where it would take forever.

    Raises:
        UsageError: a layer has more than `MOST_SUBSETS` subsets.
    """
    count = subsets(layout, kept)
    if count > MOST_SUBSETS:
        raise UsageError(
            f"naee would try {count:.3g} subsets of {kept} of {layout.experts} experts in every layer.",
            f"It is done up to {MOST_SUBSETS:,}.",
            "Give --method reap.",
        )
