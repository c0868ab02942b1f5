"""From documents to token ids: packed sequences of one length, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moectl.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHUFFLE_BUFFER = 1024
BYTE_EOS_ID = 256
BYTE_PAD_ID = 257


class Position(NamedTuple):
    """A place in a stream of tokens: before the given token of a document, counted from 0 in each pass over them."""

    epoch: int = 0
    document: int = 0
    token: int = 0


BEGINNING = Position()


def token_batches(
    documents: Iterable[Document],
    encode: Callable[[str], list[int]],
    *,
    eos_id: int,
    sequence_length: int,
    batch_size: int,
    seed: int | None = None,
    repeat: bool = False,
) -> Iterator[np.ndarray]:
    """Pack documents into batches of token ids, int64 `[B, L]` with L = `sequence_length`.

    The rows, read one after the other, are the stream `document eos document eos ...` cut every L tokens, across
    documents: no padding, no overlap, and nothing lost but the last incomplete row. Labels are the same ids, which
    transformers models shift themselves. B is `batch_size`, except for the last batch of a single pass.

    Args:
        seed: shuffles the documents, through a buffer of 1024 of them, so that data of any size can be shuffled;
            each pass differently. None keeps their order.
        repeat: start again when the documents end, forever; `documents` must then allow to be iterated again, and
            hold at least one document.
    """
    rows: list[np.ndarray] = []
    packed = token_rows(documents, encode, eos_id=eos_id, sequence_length=sequence_length, seed=seed, repeat=repeat)
    for row, _ in packed:
        rows.append(row)
        if len(rows) == batch_size:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def token_rows(
    documents: Iterable[Document],
    encode: Callable[[str], list[int]],
    *,
    eos_id: int,
    sequence_length: int,
    seed: int | None = None,
    repeat: bool = False,
    start: Position = BEGINNING,
) -> Iterator[tuple[np.ndarray, Position]]:
    """The rows `[L]` that `token_batches` stacks, each with the position after its last token.

    Given such a position as `start`, the stream goes on there. Documents before it are read again, since the order of
    a shuffled pass depends on all of them, but neither encoded nor, if they belong to an earlier pass, read.
    """
    rest = np.empty(0, dtype=np.int64)
    skipped = start.token
    for epoch, index, document in _passes(documents, seed, repeat, start):
        ids = np.array([*encode(document.text), eos_id], dtype=np.int64)[skipped:]
        stream = np.concatenate([rest, ids])
        whole = len(stream) // sequence_length * sequence_length
        for end in range(sequence_length, whole + 1, sequence_length):
            yield stream[end - sequence_length : end], Position(epoch, index, skipped + end - len(rest))
        rest = stream[whole:]
        skipped = 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0-255 are the bytes of UTF-8 text, followed by `<eos>` (256) and `<pad>` (257).

    Any text survives encoding and decoding exactly; `<eos>` written in a text is five bytes, not the special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    vocabulary |= {"<eos>": BYTE_EOS_ID, "<pad>": BYTE_PAD_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _passes(
    documents: Iterable[Document], seed: int | None, repeat: bool, start: Position
) -> Iterator[tuple[int, int, Document]]:
    for epoch in count(start.epoch) if repeat else range(start.epoch, 1):
        ordered = documents if seed is None else _shuffled(documents, random.Random(f"{seed} {epoch}"))
        first = start.document if epoch == start.epoch else 0
        for index, document in islice(enumerate(ordered), first, None):
            yield epoch, index, document


def _shuffled(documents: Iterable[Document], choices: random.Random) -> Iterator[Document]:
    buffer: list[Document] = []
    for document in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        index = choices.randrange(SHUFFLE_BUFFER)
        buffer[index], document = document, buffer[index]
        yield document
    choices.shuffle(buffer)
    yield from buffer


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them.

    A printable Latin-1 byte stands for itself; the others, in order, for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
