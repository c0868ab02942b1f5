"""Weighted mixtures of data: an endless stream of packed sequences in which every source has its share.

The stream is a function of the sources, their weights, the sequence length and the seed alone: who reads it, in what
batches and on how many machines, changes nothing. Every row says where its part stands after it, so that the stream
can be taken up again without encoding what was read before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moectl.data.chat import EncodeChat, is_chat, read_chat
from moectl.data.documents import read_documents
from moectl.data.tokens import BEGINNING, Position, token_rows
from moectl.errors import UsageError
from moectl.text import escape

_WEIGHTED = re.compile(r"(?P<spec>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture: what `--data` names, and its share of the sequences relative to the others'."""

    spec: str
    weight: float


@dataclass(frozen=True, slots=True)
class Row:
    """One packed sequence of token ids `[L]`, int64, which of them are to be learnt, its part, and where that ends."""

    token_L: np.ndarray
    learnt_L: np.ndarray
    part: int
    end: Position


def parse_parts(specs: Sequence[str]) -> tuple[Part, ...]:
    """The parts that `--data SPEC[:WEIGHT]` name; a weight that is left out is 1, and a path that exists wins.

    Raises:
        UsageError: a weight is not a positive number.
    """
    parts = []
    for text in specs:
        match = None if Path(text).expanduser().exists() else _WEIGHTED.fullmatch(text)
        spec, weight = (match["spec"], float(match["weight"])) if match else (text, 1.0)
        if not (weight > 0 and math.isfinite(weight)):
            raise UsageError(
                f"The weight of {escape(spec)} is {weight:g}.",
                "A source without a share of the sequences is never read.",
                "Give a positive weight, as in --data code.jsonl:0.7, or leave the source out.",
            )
        parts.append(Part(spec, weight))
    return tuple(parts)


def shares(weights: Sequence[float]) -> Iterator[int]:
    """For each sequence in turn the index of the part it comes from: the one furthest behind its share.

    Any prefix holds each part's share to within one sequence per part; the order is the same every time.
    """
    total = math.fsum(weights)
    taken = [0] * len(weights)
    for position in range(1, 1 << 62):
        behind = [position * weight / total - count for weight, count in zip(weights, taken, strict=True)]
        index = behind.index(max(behind))
        taken[index] += 1
        yield index


def mixture_rows(
    parts: Sequence[Part],
    encode: Callable[[str], list[int]],
    *,
    eos_id: int,
    sequence_length: int,
    seed: int,
    encode_chat: EncodeChat | None = None,
    skip: int = 0,
    starts: Sequence[Position] | None = None,
) -> Iterator[Row]:
    """The endless stream of packed sequences of a mixture, from the training split of every part.

    Each part is shuffled and packed for itself as `token_batches` does, and begins anew, in another order, when it
    ends. Of text every token is learnt; of conversations (which need `encode_chat`) what the assistant says.

    Args:
        skip: how many rows were read before; the stream goes on after them.
        starts: where each part stood then: the `end` of its last row, or `BEGINNING`.

    Raises:
        InputError: a part cannot be read or has no text in the training split.
        MachineError: the Hub cannot be reached, or a library is missing.
    """
    streams = []
    for part, start in zip(parts, starts or [BEGINNING] * len(parts), strict=True):
        chat = encode_chat if is_chat(part.spec) else None
        packed = token_rows(
            read_documents([part.spec], "train") if chat is None else read_chat(part.spec),
            _marked(encode, chat),
            eos_id=2 * eos_id + (chat is None),
            sequence_length=sequence_length,
            seed=seed,
            repeat=True,
            start=start,
        )
        streams.append(packed)
    # Not a generator itself, so that a source that does not exist is an error at once.
    order = islice(shares([part.weight for part in parts]), skip, None)
    return (_row(*next(streams[index]), index) for index in order)


def _marked(encode: Callable[[str], list[int]], chat: EncodeChat | None) -> Callable[[str], list[int]]:
    """Ids whose lowest bit says whether they are learnt, so that both are packed and cut alike."""

    def marked(text: str) -> list[int]:
        if chat is None:
            return [2 * token + 1 for token in encode(text)]
        tokens, answers = chat(text)
        return [2 * token + answer for token, answer in zip(tokens, answers, strict=True)]

    return marked


def _row(marked_L: np.ndarray, end: Position, part: int) -> Row:
    return Row(marked_L >> 1, (marked_L & 1).astype(bool), part, end)
