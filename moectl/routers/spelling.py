"""Routers as they are written on a command line: `switch:cf=1.25,expert-choice,deepseek-v3:groups=8,top=4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moectl.errors import UsageError
from moectl.routers.registry import Entry, find
from moectl.text import shown

SHORT = {"cf": "capacity_factor", "k": "top_k", "top": "top_groups", "aux": "aux_loss", "z": "z_loss"}
"""Short names of options, of every router that has them."""


@dataclass(frozen=True, slots=True)
class Named:
    """A router that was asked for: its entry, the options given, and how it was written."""

    entry: Entry
    given: Mapping[str, str]
    text: str

    def options(self, **defaults: Any) -> Any:
        """An `Options` of its class: what was given, else what `defaults` says where the class has it, else its own.

        Raises:
            UsageError: there is no such option, or its value is of another type.
        """
        kind = self.entry.load().Options
        own = kind()
        known = {field.name: getattr(own, field.name) for field in fields(kind)}
        values = {name: value for name, value in defaults.items() if name in known}
        for short, text in self.given.items():
            name = SHORT.get(short, short)
            if name not in known:
                offered = [*known, *(key for key, full in SHORT.items() if full in known)]
                raise UsageError(
                    f"The router {self.entry.name} has no option {shown(short)!r}.", "", f"It has {', '.join(offered)}."
                )
            values[name] = _value(self.entry.name, short, text, known[name])
        return kind(**values)


def parse(text: str) -> list[Named]:
    """Routers in a list, separated by commas, each with options after a colon.

    Raises:
        UsageError: there is no such router, or the text has another form.
    """
    parts: list[list[str]] = []
    for piece in text.split(","):
        if ":" in piece or "=" not in piece:
            parts.append([piece.strip()])
        elif parts:
            parts[-1].append(piece.strip())
        else:
            raise UsageError(f"{shown(text)!r} begins with an option.", "", "Write NAME:OPTION=VALUE.")
    return [_named(part) for part in parts]


def _named(pieces: Sequence[str]) -> Named:
    name, _, first = pieces[0].partition(":")
    given: dict[str, str] = {}
    for option in [*([first] if first else []), *pieces[1:]]:
        key, equals, value = option.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{shown(option)!r} is no option of a router.", "", "Write NAME:OPTION=VALUE.")
        given[key.strip().replace("-", "_")] = value.strip()
    return Named(find(name), given, ",".join(pieces))


def _value(router: str, option: str, text: str, default: Any) -> Any:
    """The text as the type of the default."""
    wrong = UsageError(
        f"The router {router} cannot take {option}={shown(text)}.", "", f"Give a value such as {default!r}."
    )
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise wrong
        return text.lower() in ("true", "yes", "1")
    try:
        return type(default)(text)
    except (TypeError, ValueError):
        raise wrong from None
