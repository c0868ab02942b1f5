"""Routers that give each token one expert at most."""

from __future__ import annotations

from typing import Any

from moectl.routers.protocol import Router


class Single(Router):
    """A router whose rule is of one expert per token.

    Raises:
        ValueError: more were asked for.
    """

    def __init__(self, hidden_size: int | None, num_experts: int, options: Any = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.top_k != 1:
            raise ValueError(f"top_k is {self.options.top_k}, and {type(self).__name__} gives a token one expert")
