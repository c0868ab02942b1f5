"""Text for token ids: what each adds to those before it, so that the pieces put together are the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Spell = Callable[[Sequence[int]], list[str]]
"""From token ids that follow one another to the text of each."""

_WINDOW = 8
"""Tokens that are decoded together: more than one character of UTF-8 can be cut into."""
UNFINISHED = "\ufffd"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token after those before it; what is a part of a character shows as U+FFFD, and the last of its
    tokens as the character.
    """
    found: list[str] = []
    for place in range(len(ids)):
        start = max(0, place - _WINDOW)
        before, after = _decoded(tokenizer, ids[start:place]), _decoded(tokenizer, ids[start : place + 1])
        piece = after[len(before.rstrip(UNFINISHED)) :]
        found.append(piece if not piece.endswith(UNFINISHED) else UNFINISHED)
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if len(ids) else ""
