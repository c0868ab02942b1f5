"""What an encoder-decoder is calibrated and trained on: sources and what its decoder reads, made of rows of text.

Legend: B sequences of text, L tokens each; S tokens of a source, T of a target.
"""

from __future__ import annotations

from itertools import chain, count, takewhile
from typing import Any

import numpy as np

from moectl.checkpoint.source import Checkpoint
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import load_tokenizer

NOISE, SPAN = 0.15, 3
"""The share of a text that is taken out of it, and the mean length of a piece (T5, arXiv 1910.10683, section 3.3.4)."""

Ids = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Token ids [B, L]; for an encoder-decoder those of sources [B, S] and those of their targets [B, T]."""


def parts(tokens: Ids) -> tuple[np.ndarray, ...]:
    """The ids of a decoder, or those of sources and those of targets."""
    return tokens if isinstance(tokens, tuple) else (tokens,)


def model_inputs(source: Checkpoint, token_BL: np.ndarray) -> Ids:
    """Token ids as the model takes them; of an encoder-decoder the sources, and the targets as its decoder reads them.

    With a tokenizer that has T5's sentinels, spans are taken out of the text and are the target; with any other the
    target is the text itself. Either way the decoder reads it after the token it begins with.

    Raises:
        InputError: transformers cannot use its configuration, or it has no tokenizer.
    """
    config = read_config(source)
    if not config.is_encoder_decoder:
        return token_BL
    sentinels = sentinel_ids(load_tokenizer(source))
    source_BS, target_BT = spans_apart(token_BL, sentinels) if sentinels else (token_BL, token_BL[:, :-1])
    return source_BS, started(target_BT, first_id(config))


def started(target_BT: np.ndarray, first: int) -> np.ndarray:
    """Targets after the id that a decoder begins with [B, 1 + T]: each token is predicted from those before it."""
    return np.concatenate([np.full((len(target_BT), 1), first, target_BT.dtype), target_BT], axis=1)


def sentinel_ids(tokenizer: Any) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>` and so on, as far as a tokenizer has them."""
    known = tokenizer.get_vocab()
    return [known[name] for name in takewhile(known.__contains__, (f"<extra_id_{number}>" for number in count()))]


def spans_apart(token_BL: np.ndarray, sentinels: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """T5's span corruption (ibid.): the texts with a sentinel for each span, and each sentinel with its span.

    All texts lose as many tokens in as many spans, so that they stay of one length; where the spans are follows from
    the seed. A text begins with what stays and ends with a span. There are no more spans than sentinels.

    Args:
        token_BL: L is at least 2.
    """
    choose = np.random.default_rng(seed)
    length = token_BL.shape[1]
    lost = max(1, round(NOISE * length))
    spans = min(max(1, round(lost / SPAN)), len(sentinels))

    def cut(total: int) -> np.ndarray:
        """Random lengths of as many pieces as there are spans, none of them empty."""
        inner = np.sort(choose.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(inner, prepend=0, append=total)

    marks = np.array(sentinels[:spans], token_BL.dtype)[:, None]
    sources, targets = [], []
    for token_L in token_BL:
        lengths = np.stack([cut(length - lost), cut(lost)], axis=1).ravel()
        pieces = np.split(token_L, np.cumsum(lengths)[:-1])
        sources.append(np.concatenate([*chain(*zip(pieces[::2], marks, strict=True))]))
        targets.append(np.concatenate([*chain(*zip(marks, pieces[1::2], strict=True))]))
    return np.stack(sources), np.stack(targets)


def first_id(config: Any) -> int:
    """What a decoder's input begins with; T5 begins with padding."""
    found = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((value for value in found if isinstance(value, int)), 0)
