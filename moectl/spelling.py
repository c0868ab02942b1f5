"""Names with options as they stand on a command line: `switch:cf=1.25,expert-choice,deepseek-v3:groups=8,top=4`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any, TypeVar

from moectl.errors import UsageError
from moectl.text import shown

Kind = TypeVar("Kind")


def split(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names in a list, separated by commas, each with options after a colon.

    Raises:
        UsageError: the text has another form.
    """
    parts: list[list[str]] = []
    for piece in text.split(","):
        if ":" in piece or "=" not in piece:
            parts.append([piece.strip()])
        elif parts:
            parts[-1].append(piece.strip())
        else:
            raise UsageError(f"{shown(text)} begins with an option.", "", "Write NAME:OPTION=VALUE.")
    return [_named(part) for part in parts]


def filled(
    kind: type[Kind],
    given: Mapping[str, str],
    what: str,
    *,
    short: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Kind:
    """A dataclass of options: what was given as text, else what `defaults` has of its fields, else its own.

    Args:
        kind: a dataclass with a default for every field, of type int, float, bool or str, which its values show.
        what: whose options they are, for messages.
        short: short names of fields.

    Raises:
        UsageError: there is no such option, or its value is of another type or not finite.
    """
    own, short = kind(), short or {}
    known = {field.name: getattr(own, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    values = {name: value for name, value in (defaults or {}).items() if name in known}
    for said, text in given.items():
        name = said if said in known else short.get(said, said)
        if name not in known:
            offered = [*known, *(key for key, full in short.items() if full in known and key not in known)]
            raise UsageError(f"{what} has no option {shown(said)}.", "", f"It has {', '.join(offered) or 'none'}.")
        values[name] = _value(what, said, text, known[name])
    return kind(**values)


def explained(kind: Any, short: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The fields of a dataclass of options: `option`, with its short name, `default`, `meaning` by its docstring."""
    own, told = kind(), _told(kind)
    names = {full: key for key, full in (short or {}).items()}
    return [
        {
            "option": f"{field.name} ({names[field.name]})" if field.name in names else field.name,
            "default": getattr(own, field.name),
            "meaning": told.get(field.name, ""),
        }
        for field in fields(kind)
    ]


def _told(kind: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and those it is made from say of its fields, after `Attributes:`."""
    known = {field.name for field in fields(kind)}
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(each.__doc__ or "").partition("Attributes:")[2].splitlines():
            before, _, text = line.strip().partition(": ")
            if known.issuperset(parts := before.split(", ")):
                names = parts
                found |= dict.fromkeys(names, text)
            elif line.strip():
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found


def _named(pieces: Sequence[str]) -> tuple[str, dict[str, str]]:
    name, _, first = pieces[0].partition(":")
    given: dict[str, str] = {}
    for option in [*([first] if first else []), *pieces[1:]]:
        key, equals, value = option.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{shown(option)} is no option of {shown(name)}.", "", "Write NAME:OPTION=VALUE.")
        given[key.strip().replace("-", "_")] = value.strip()
    return name, given


def _value(what: str, option: str, text: str, default: Any) -> Any:
    """The text as the type of the default."""
    wrong = UsageError(f"{what} cannot take {option}={shown(text)}.", "", f"Give a value such as {default!r}.")
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise wrong
        return text.lower() in ("true", "yes", "1")
    try:
        value = type(default)(text)
    except (TypeError, ValueError):
        raise wrong from None
    if isinstance(value, float) and not isfinite(value):
        raise wrong
    return value
