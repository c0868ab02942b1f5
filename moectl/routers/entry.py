"""What is told of a router before it is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Kind = Literal["router", "slots", "layer"]
Need = Literal["logits", "hidden", "tokens", "tasks", "modalities", "nothing"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table.

    Attributes:
        name: on the command line.
        title: what its papers call it.
        papers: arXiv ids, or the venue where there is none.
        where: module and class.
        needs: what the choice is computed from. `logits`: of a linear gate, so that a trace of any model can be routed
            again; `hidden`: a gate of its own, over hidden states.
        causal: whether, in use and with its own defaults, where a token goes does not depend on later tokens.
        trainable: whether weights have a gradient to what the router was given.
        source: the equation or code that the formula was checked against; empty: from memory.
        same_as: the transformers class that it equals, by a test.
        kind: `router` returns a Routing, `slots` a Slots; a `layer` is a whole module, whose routing is not apart.
    """

    name: str
    title: str
    papers: tuple[str, ...]
    where: str
    needs: tuple[Need, ...] = ("logits",)
    causal: bool = True
    trainable: bool = True
    source: str = ""
    same_as: str = ""
    kind: Kind = "router"

    @property
    def verified(self) -> bool:
        """Whether its formula was checked against a source."""
        return bool(self.source)

    def load(self) -> Any:
        """The class."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"moectl.routers.{module}"), name)
