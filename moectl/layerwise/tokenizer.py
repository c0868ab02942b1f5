"""The tokenizer that lies beside a checkpoint's weights, and how moectl encodes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.components import within
from moectl.integrations.complete import make_known
from moectl.layerwise.quiet import quiet
from moectl.text import escape, reason


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of transformers; code that comes with it is never run.

    Raises:
        InputError: there is none, or transformers cannot use it.
    """
    from transformers import AutoTokenizer

    make_known(checkpoint)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its parser raises, it is about the files it was given
        raise _unusable(checkpoint, reason(error, 200)) from error
    # Without any files transformers makes, for Qwen and others, one that has special tokens alone (5.17 to 5.23).
    if not any(token.strip("\u2581") for token in tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)):
        raise _unusable(checkpoint, "it knows no text.")
    return tokenizer


def _unusable(checkpoint: Checkpoint, why: str) -> InputError:
    return InputError(
        f"{escape(checkpoint.name)} has no tokenizer that transformers can use: {why}",
        "Text cannot become token ids without it.",
        "Put the tokenizer's files beside the weights (tokenizer.json, tokenizer_config.json).",
    )


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """From text to its ids, without the special ids some tokenizers put around it."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    return encode


def separator(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """The id between documents: the end of text, else the beginning of text, of the tokenizer or else the config.

    Raises:
        InputError: neither is known.
    """
    return _first_id(checkpoint, tokenizer, ("eos_token_id", "bos_token_id"))


def prefix(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """The id a document's first token is predicted from: the beginning of text, else the end of the one before.

    Raises:
        InputError: neither is known.
    """
    return _first_id(checkpoint, tokenizer, ("bos_token_id", "eos_token_id"))


def _first_id(checkpoint: Checkpoint, tokenizer: Any, names: tuple[str, str]) -> int:
    for name in names:
        for value in (getattr(tokenizer, name), *(place.get(name) for place in within(checkpoint.config))):
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int:
                return first
    raise InputError(
        f"{escape(checkpoint.name)} has neither an end-of-text nor a beginning-of-text id.",
        "Documents cannot be told apart without one.",
        "Set `eos_token_id` in its config.json or `eos_token` in its tokenizer_config.json.",
    )
