"""Conversations: JSON lines with `messages`, rendered by a tokenizer's chat template, the assistant's tokens marked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.data.documents import Documents, Source
from moectl.errors import InputError
from moectl.text import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodeChat = Callable[[str], tuple[list[int], list[bool]]]
"""From a conversation as JSON text to its token ids, and which of them the assistant says."""


def is_chat(spec: str) -> bool:
    """Whether `--data` names a .jsonl file of conversations: its first line has `messages` and no `text`."""
    path = Path(spec).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        line = next((line for line in file if not line.isspace()), b"null")
    try:
        first = json.loads(line)
    except ValueError:
        return False
    return isinstance(first, dict) and "messages" in first and "text" not in first


def read_chat(spec: str) -> Documents:
    """The training split of a file of conversations; the text of each document is its messages as JSON."""
    path = Path(spec).expanduser()
    return Documents((Source(spec, path.stem, partial(_conversations, path)),), "train")


def chat_encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> EncodeChat:
    """The function that renders conversations with the chat template of the tokenizer called `name`.

    Raises:
        InputError: there is no template, or it does not mark what the assistant says.
    """
    if not tokenizer.chat_template or "generation %}" not in str(tokenizer.chat_template).replace("-%}", "%}"):
        raise InputError(
            f"The tokenizer of {escape(name)} has no chat template that marks the assistant's words.",
            "The loss is taken on answers only, and {% generation %} ... {% endgeneration %} says which these are.",
            "Put that around the assistant's content in chat_template.jinja, or give the data as `text`.",
        )

    def encode(text: str) -> tuple[list[int], list[bool]]:
        found: Any = tokenizer.apply_chat_template(
            json.loads(text), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    return encode


def _conversations(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                messages = json.loads(line)["messages"]
                good = all(isinstance(said["role"], str) and isinstance(said["content"], str) for said in messages)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise InputError(
                    f"{escape(str(path))}, line {number}, is no conversation.",
                    "Every line of a file whose first has `messages` has a list of them, each with role and content.",
                    "Correct the line, or remove it.",
                )
            yield json.dumps(messages)
