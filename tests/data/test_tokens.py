"""Packing keeps the stream of tokens; byte tokens keep the text."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.data.documents import Document
from moectl.data.tokens import (
    BYTE_EOS_ID,
    BYTE_PAD_ID,
    SHUFFLE_BUFFER,
    Position,
    byte_tokenizer,
    token_batches,
    token_rows,
)

EOS = 1_000


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, "test") for text in texts]


def encode(text: str) -> list[int]:
    return list(text.encode())


def batches(texts: list[str], length: int = 8, size: int = 3, **options: Any) -> list[np.ndarray]:
    packed = token_batches(documents(texts), encode, eos_id=EOS, sequence_length=length, batch_size=size, **options)
    return list(islice(packed, 1000))


def documents_in(stream: np.ndarray) -> list[str]:
    """The whole documents of a stream of tokens: what lies between two ends."""
    pieces = np.split(stream, np.flatnonzero(stream == EOS) + 1)
    return [bytes(piece[:-1].tolist()).decode() for piece in pieces[:-1]]


@given(st.lists(st.text(max_size=40)), st.integers(2, 20), st.integers(1, 5))
def test_rows_are_the_stream_less_the_last_incomplete_one(texts: list[str], length: int, size: int) -> None:
    stream = list(chain.from_iterable([*text.encode(), EOS] for text in texts))
    packed = batches(texts, length, size)
    assert [token for batch in packed for token in batch.flatten().tolist()] == stream[: len(stream) // length * length]
    assert all(batch.shape == (size, length) for batch in packed[:-1])
    assert all(1 <= len(batch) <= size and batch.dtype == np.int64 for batch in packed)


def test_a_seed_orders_the_documents_and_loses_none() -> None:
    texts = [f"{number:05}" for number in range(3 * SHUFFLE_BUFFER)]
    streams = [np.concatenate(batches(texts, 6, 64, seed=seed)).flatten() for seed in (0, 0, 1)]
    orders = [documents_in(stream) for stream in streams]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == texts
    moved = np.abs(np.array(orders[0], dtype=int) - np.arange(len(texts)))
    assert moved.mean() > SHUFFLE_BUFFER / 4


def test_repeating_goes_on_with_another_order_and_full_batches() -> None:
    texts = [f"{number:02}" for number in range(50)]
    packed = batches(texts, 3, 5, seed=0, repeat=True)
    assert len(packed) == 1000 and {batch.shape for batch in packed} == {(5, 3)}
    order = documents_in(np.concatenate(packed).flatten())
    first, second = order[:50], order[50:100]
    assert first != second and sorted(first) == sorted(second) == texts


def test_without_a_seed_the_order_stays() -> None:
    order = documents_in(np.concatenate(batches(["c", "a", "b"], 1, 2)).flatten())
    assert order == ["c", "a", "b"]


@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=8),
    st.integers(1, 20),
    st.sampled_from([None, 0]),
    st.data(),
)
def test_a_stream_goes_on_from_the_position_of_any_row(
    texts: list[str], length: int, seed: int | None, data: st.DataObject
) -> None:
    rows = partial(token_rows, documents(texts), eos_id=EOS, sequence_length=length, seed=seed, repeat=True)
    expected = list(islice(rows(encode), 40))
    taken = data.draw(st.integers(1, 30))
    encoded: list[str] = []

    def watched(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    found = list(islice(rows(watched, start=expected[taken - 1][1]), 10))
    for (row, end), (expected_row, expected_end) in zip(found, expected[taken:], strict=False):
        assert row.tolist() == expected_row.tolist() and end == expected_end
    ends = sum(int((row == EOS).sum()) for row, _ in found)
    assert len(encoded) <= ends + 2, "no document before the one the row ended in is encoded again"
    epoch, document, token = expected[taken - 1][1]
    beside = next(rows(encode, start=Position(epoch, document, max(0, token - 1))))[0]
    assert token == 0 or len(set(expected[taken][0].tolist())) == 1 or beside.tolist() != found[0][0].tolist()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@settings(deadline=None)
@given(text=st.text())
def test_tokens_are_the_bytes_of_the_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_every_byte_and_special_token_has_its_place(tokenizer: Any) -> None:
    assert len(tokenizer) == 258
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (BYTE_EOS_ID, BYTE_PAD_ID)
    assert sorted(tokenizer.get_vocab().values()) == list(range(258))


@pytest.mark.parametrize("text", ["<eos>", "a<pad>b", " don't  .\r\n\x00\u2028é🦉", "  two  spaces ", ""])
def test_the_saved_tokenizer_is_the_same(tokenizer: Any, tmp_path: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == list(text.encode())
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (BYTE_EOS_ID, BYTE_PAD_ID)
