"""What older releases of transformers do not do yet, though they are installable with moectl: the one place to ask."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from moectl.errors import InputError
from moectl.families.components import within
from moectl.text import escape

RECORDS = "5.19"
"""The first release that says of nearly every family which modules compute its router logits."""

WORKS_SINCE = {
    "aria": "5.18",  # before, its experts choose for themselves, where nobody sees it
    "aria_text": "5.18",
    "doge": "5.18",  # before, its MoE layers raise a TypeError
    "switch_transformers": "5.18",  # before, no token is dropped, and what is called router logits is none
}
"""`model_type` -> the first release whose models of that family can be run, where it is not 5.17."""


def is_older(release: str) -> bool:
    """Whether the installed transformers is older than a release ("5.18")."""
    installed = metadata.version("transformers").split(".")
    return [int(part) for part in installed[:2]] < [int(part) for part in release.split(".")]


def refuse_older(config: Mapping[str, Any]) -> None:
    """Refuse a model that the installed transformers has, but does not run rightly.

    Raises:
        InputError: it is one.
    """
    for place in within(config):
        kind = place.get("model_type")
        since = WORKS_SINCE.get(kind) if isinstance(kind, str) else None
        if since and is_older(since):
            raise needs(
                since, f"transformers {metadata.version('transformers')} does not run {escape(str(kind))} rightly."
            )


def needs(release: str, what: str, why: str = "") -> InputError:
    """The error for what a newer transformers would do."""
    return InputError(what, why, f"Install transformers {release} or newer: pip install -U 'transformers>={release}'.")
