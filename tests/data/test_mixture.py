"""A mixture's order is a function of seed and position, and every prefix holds each part's share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moectl.data.chat import chat_encoder, is_chat, read_chat
from moectl.data.mixture import Part, Row, mixture_rows, parse_parts, shares
from moectl.data.tokens import BEGINNING, Position, byte_tokenizer
from moectl.errors import InputError, UsageError


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_every_prefix_holds_the_shares(weights: list[float], length: int) -> None:
    taken = [0] * len(weights)
    for position, index in enumerate(islice(shares(weights), length), start=1):
        taken[index] += 1
        for weight, count in zip(weights, taken, strict=True):
            assert abs(count - position * weight / sum(weights)) <= len(weights)


def test_weights_are_read_and_paths_win(tmp_path: Path) -> None:
    odd = tmp_path / "part:2"
    odd.mkdir()
    assert parse_parts(["a.jsonl", "a.jsonl:0.25", "builtin:code:3", "org/name:train", str(odd)]) == (
        Part("a.jsonl", 1.0),
        Part("a.jsonl", 0.25),
        Part("builtin:code", 3.0),
        Part("org/name:train", 1.0),
        Part(str(odd), 1.0),
    )
    with pytest.raises(UsageError, match="weight of a is 0"):
        parse_parts(["a:0"])


def rows(tmp_path: Path, count: int, seed: int = 0, weight: float = 3.0) -> list[tuple[int, bytes]]:
    parts = []
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{name * 7} {number}"}}\n' for number in range(60)))
        parts.append(Part(str(path), weight if name == "a" else 1.0))
    stream = mixture_rows(parts, lambda text: list(text.encode()), eos_id=256, sequence_length=16, seed=seed)
    return [(row.part, row.token_L.tobytes()) for row in islice(stream, count)]


def test_the_stream_is_a_function_of_the_seed_and_the_position(tmp_path: Path) -> None:
    first = rows(tmp_path, 200)
    assert first == rows(tmp_path, 200) and first[:50] == rows(tmp_path, 50)
    assert first != rows(tmp_path, 200, seed=1) and first != rows(tmp_path, 200, weight=2.0)


def test_parts_have_their_shares_and_repeat(tmp_path: Path) -> None:
    found = rows(tmp_path, 200)
    assert sum(part == 0 for part, _ in found) == 150
    for part, raw in found:
        ids = np.frombuffer(raw, dtype=np.int64)
        assert ids.shape == (16,) and not (ids == ord("ba"[part])).any(), "a sequence is of one part"
    assert len({raw for part, raw in found if part == 0}) > 60, "a second pass is in another order"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)


def test_of_a_conversation_only_the_answers_are_learnt(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    line = '{"messages": [{"role": "user", "content": "ask%d"}, {"role": "assistant", "content": "<say%d>"}]}\n'
    path.write_text("".join(line % (number, number) for number in range(50)))
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="marks the assistant"):
        chat_encoder(tokenizer, "model")
    tokenizer.chat_template = TEMPLATE
    stream = mixture_rows(
        [Part(str(path), 1.0)],
        tokenizer.encode,
        eos_id=256,
        sequence_length=64,
        seed=0,
        encode_chat=chat_encoder(tokenizer, "model"),
    )
    found = list(islice(stream, 12))
    tokens = np.concatenate([row.token_L for row in found])
    learnt = np.concatenate([row.learnt_L for row in found])
    text = bytes(int(token) for token in tokens[:700] if token < 256).decode()
    assert text.startswith("U:ask") and "A:<say" in text
    inside = np.zeros(len(tokens), dtype=bool)
    start = None
    for at, token in enumerate(tokens):
        start = at if token == ord("<") else start
        if token == ord(">"):
            inside[start : at + 1] = True
    whole = len(tokens) - 20  # the last answer may be cut
    assert (learnt[:whole] == inside[:whole]).all() and 0 < learnt.sum() < len(learnt) / 2


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.2, 5.0, 1.0)])
def test_a_mixture_goes_on_where_it_was_left(tmp_path: Path, weights: tuple[float, ...]) -> None:
    """Against reading all of it again: text and conversations, within a pass and after several."""
    talk = '{"messages": [{"role": "user", "content": "u%d"}, {"role": "assistant", "content": "a%d"}]}\n'
    parts = []
    for index, weight in enumerate(weights):
        path = tmp_path / f"{index}.jsonl"
        line = talk if index == 1 else '{"text": "the text %d of %d"}\n'
        path.write_text("".join(line % (number, number) for number in range(30)))
        parts.append(Part(str(path), weight))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encode_chat = chat_encoder(tokenizer, "model")
    encoded: list[str] = []

    def stream(**where: Any) -> Iterator[Row]:
        def encode(text: str) -> list[int]:
            encoded.append(text)
            return list(text.encode())

        def chat(text: str) -> tuple[list[int], list[bool]]:
            encoded.append(text)
            return encode_chat(text)

        return mixture_rows(parts, encode, eos_id=256, sequence_length=48, seed=7, encode_chat=chat, **where)

    def shown(rows: Iterable[Row]) -> list[Any]:
        return [(row.part, row.token_L.tolist(), row.learnt_L.tolist(), row.end) for row in rows]

    expected = list(islice(stream(), 150))
    for skip in (0, 1, 2, 17, 50, 120):
        ends = {row.part: row.end for row in expected[:skip]}
        starts = [ends.get(part, BEGINNING) for part in range(len(parts))]
        encoded.clear()
        assert shown(islice(stream(skip=skip, starts=starts), 30)) == shown(expected[skip : skip + 30])
        # A document has 10 tokens at least: what 30 rows hold, and those they begin and end in.
        assert len(encoded) <= 30 * 48 / 10 + 2 * len(parts)
        if skip:
            wrong = [Position(place.epoch, place.document + 1, place.token) for place in starts]
            assert shown(islice(stream(skip=skip, starts=wrong), 30)) != shown(expected[skip : skip + 30])


def test_a_line_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": "hello"}\n')
    assert is_chat(str(path)) and not is_chat("builtin:code")
    with pytest.raises(InputError, match="line 2"):
        list(read_chat(str(path)))
