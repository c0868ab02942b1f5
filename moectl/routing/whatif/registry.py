"""Every what-if: its name, what it needs of a trace, and where it is. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from moectl.errors import UsageError
from moectl.text import shown

Need = Literal["index", "weights", "scores"]


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One question.

    Attributes:
        name: on the command line.
        question: in words.
        where: the module beside this one; it has a frozen dataclass `Options`, with a default for everything, and
            `run(trace: RoutingTrace, options: Options) -> Finding`.
        needs: what the trace must hold; it refuses a trace without it.
        papers: arXiv ids or venues.
    """

    name: str
    question: str
    where: str
    needs: tuple[Need, ...] = ("index",)
    papers: tuple[str, ...] = ()

    def load(self) -> Any:
        """The module."""
        return import_module(f"moectl.routing.whatif.{self.where}")


WHAT_IFS: tuple[WhatIf, ...] = (
    WhatIf("capacity", "How much is dropped at a capacity?", "capacity", papers=("2006.16668", "2101.03961")),
    WhatIf("rectify", "What would Rectify-Router save?", "rectify", ("index", "scores"), ("2402.12399",)),
    WhatIf("cache", "How often is an expert in a cache?", "cache", papers=("2312.17238", "2401.14361")),
    WhatIf(
        "prefetch", "How often is the next layer's expert guessed?", "prefetch", papers=("2401.14361", "2312.17238")
    ),
    WhatIf(
        "offload", "Is a missing expert fetched, or run on the CPU?", "offload", papers=("2402.07033", "2303.06182")
    ),
    WhatIf("placement", "How even is the load of GPUs?", "placement", papers=("2412.19437",)),
    WhatIf(
        "dynamic",
        "What do shadowing, migration and prediction gain?",
        "dynamic",
        papers=("PPoPP 2022", "2304.03946", "USENIX ATC 2023"),
    ),
    WhatIf("parallelism", "Which parallelism suits the loads?", "parallelism", papers=("2206.03382", "2201.05596")),
    WhatIf(
        "all-to-all", "How many bytes go between GPUs and nodes?", "all_to_all", papers=("2412.19437", "2203.14685")
    ),
    WhatIf(
        "node-limit",
        "What does a limit of nodes change?",
        "node_limit",
        ("index", "scores"),
        ("2405.04434", "2412.19437"),
    ),
    WhatIf("pruning", "What does each domain lose without some experts?", "pruning", papers=("2402.14800",)),
    WhatIf("coalescing", "How many experts does a batch read?", "coalescing"),
)


def find(name: str) -> WhatIf:
    """The what-if of that name.

    Raises:
        UsageError: there is none.
    """
    known = {each.name: each for each in WHAT_IFS}
    if name not in known:
        raise UsageError(f"There is no what-if {shown(name)!r}.", "", f"Give one of {', '.join(known)}.")
    return known[name]
