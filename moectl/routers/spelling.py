"""Routers as they are written on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moectl.routers.registry import Entry, find
from moectl.spelling import filled, split

SHORT = {"cf": "capacity_factor", "k": "top_k", "top": "top_groups", "aux": "aux_loss", "z": "z_loss"}
"""Short names of options, of every router that has them."""


@dataclass(frozen=True, slots=True)
class Named:
    """A router that was asked for: its entry, and the options given, as text."""

    entry: Entry
    given: Mapping[str, str]

    @property
    def text(self) -> str:
        """How it is written."""
        return (
            self.entry.name + ":" * bool(self.given) + ",".join(f"{key}={value}" for key, value in self.given.items())
        )

    def options(self, **defaults: Any) -> Any:
        """An `Options` of its class: what was given, else what `defaults` says where the class has it, else its own.

        Raises:
            UsageError: there is no such option, or its value is of another type.
        """
        return filled(
            self.entry.load().Options, self.given, f"The router {self.entry.name}", short=SHORT, defaults=defaults
        )


def parse(text: str) -> list[Named]:
    """Routers in a list, each with options: `switch:cf=1.25,expert-choice,deepseek-v3:groups=8,top=4`.

    Raises:
        UsageError: there is no such router, or the text has another form.
    """
    return [Named(find(name), given) for name, given in split(text)]
