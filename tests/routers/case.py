"""What is true of each router: a case says it, and `test_every_router.py` holds every router to its case.

Legend: T tokens, D hidden, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.routers.protocol import Context, Router
from moectl.routers.registry import find

HIDDEN, EXPERTS = 16, 8

Reference = Callable[[Router, np.ndarray, Context], tuple[np.ndarray, np.ndarray]]
"""(router, scores [T, E] or, of a router that needs hidden states, those [T, D]; in float64, context) -> index [T, K],
weight [T, K], by loops over tokens and experts, with none of the router's own code, in its order of choices."""


@dataclass(frozen=True)
class Case:
    """One router with options, and its properties.

    Attributes:
        name: of the registry.
        reference: independent of the code that is tested.
        sums: what a token's weights may add up to, given the sums [T]; None: anything.
        options: that differ from its defaults.
        context: what it needs besides, for T tokens; made anew for each call, so that draws repeat.
        distinct: whether a token's experts all differ.
        balance: largest load over the mean that is allowed for 4096 tokens of independent scores; None: its rule
            says nothing of balance, and `why` says so.
        room: the most assignments an expert takes, given the number of tokens; None: no limit.
        numerical: whether gradients are those of the function; False for estimators, which have tests of their own.
        why: of what does not hold.
        num_experts: of the router.
        width: of its scores, where some stand for experts beyond `num_experts`; None: `num_experts`.
    """

    name: str
    reference: Reference
    sums: Callable[[Tensor], Tensor] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    context: Callable[[int], Context] = lambda _tokens: Context(generator=torch.Generator().manual_seed(0))
    distinct: bool = True
    balance: float | None = 1.5
    room: Callable[[int], int] | None = None
    numerical: bool = True
    why: str = ""
    num_experts: int = EXPERTS
    width: int | None = None

    @property
    def label(self) -> str:
        """Of the test."""
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def by_hidden(self) -> bool:
        """Whether it is given hidden states, and no scores."""
        return "hidden" in find(self.name).needs

    def router(self, dtype: torch.dtype = torch.float32) -> Router:
        """It, with parameters that are always the same."""
        torch.manual_seed(0)
        kind = find(self.name).load()
        made: Router = kind(HIDDEN if self.by_hidden else None, self.num_experts, kind.Options(**self.options))
        return made.to(dtype)

    def given(self, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent normal scores [T, E], or hidden states [T, D]."""
        width = HIDDEN if self.by_hidden else self.width or self.num_experts
        return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def run(self, router: Router, given: Tensor, context: Context) -> Any:
        """Its Routing."""
        return router(given, context) if self.by_hidden else router.route(given, context)


def one(sum_T: Tensor) -> Tensor:
    """Sums that are 1."""
    return (sum_T - 1).abs() < 1e-5


def at_most_one(sum_T: Tensor) -> Tensor:
    """Sums in [0, 1]."""
    return (sum_T > -1e-6) & (sum_T < 1 + 1e-5)
