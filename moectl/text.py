"""Words that are safe to print: names and values out of files, made visible and short.

Whatever a checkpoint, a data file or the Hub says may hold control characters or be megabytes long.
"""

from __future__ import annotations

from collections.abc import Sequence


def escape(text: str) -> str:
    """`text` with control characters made visible, so that a hostile name cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object, limit: int = 120) -> str:
    """`value` for a message: on one line, printable, not longer than a line or two."""
    text = value if isinstance(value, str) else repr(value)
    return escape(text if len(text) <= limit else text[:limit] + "...")


def few(lines: Sequence[str], limit: int = 5) -> str:
    """The first of them on one line, and how many more there are."""
    return "; ".join(lines[:limit]) + (f"; and {len(lines) - limit} more" if len(lines) > limit else "")


def reason(error: Exception, limit: int = 300) -> str:
    """The first line of what an error of another library says, printable; its kind if it says nothing."""
    return escape((str(error).strip() or type(error).__name__).splitlines()[0])[:limit]
