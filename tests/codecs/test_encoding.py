"""What is encoded comes back, at the rate the theory gives; what is not an encoding is refused and harms nothing."""

import numpy as np
import plain_codes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.codecs import encoding
from moectl.codecs.encoding import decode, encode
from moectl.codecs.rate import entropy, expected
from moectl.codecs.tables import QMOE, RATIOS, choose, table

NUMBERS = (QMOE, *RATIOS)


def ternary(rng, rows, width, zero_share, plus_share=0.5):
    """Independent weights, int8 [rows, width]."""
    signs = np.where(rng.random((rows, width)) < plus_share, np.int8(1), np.int8(-1))
    return np.where(rng.random((rows, width)) < zero_share, np.int8(0), signs)


def back(codes, counts, number, width):
    """The weights as -1, 0 and 1."""
    values = np.broadcast_to(np.array([-1, 1], np.int8), (len(counts), 2))
    return decode(codes, counts, table(number), values, width)


@st.composite
def matrices(draw):
    """Matrices of all widths with rows of every kind: dense, empty, without - or +, all of one sign."""
    width = draw(st.one_of(st.integers(0, 70), st.integers(0, 20_000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = draw(st.lists(st.tuples(st.sampled_from([0, 0.3, 0.8, 0.9, 0.97, 0.999, 1]), st.sampled_from([0, 0.5, 1]))))
    rows = [ternary(rng, 1, width, *kind) for kind in kinds]
    return np.concatenate([np.empty((0, width), np.int8), *rows])


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(NUMBERS))
def test_what_is_encoded_comes_back(trits, number):
    codes, counts = encode(trits, table(number))
    assert codes.dtype == counts.dtype == np.uint16
    assert np.array_equal(back(codes, counts, number, trits.shape[1]), trits)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("width", [1, 2, 27, 28, 29, 255, 256, 1000, 20_000])
def test_rows_of_zeros_and_rows_of_one_sign_come_back_at_every_width(number, width):
    trits = np.zeros((4, width), np.int8)
    trits[1], trits[2], trits[3, -1] = 1, -1, -1
    assert np.array_equal(back(*encode(trits, table(number)), number, width), trits)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**32), st.sampled_from([QMOE, 3, 20]))
def test_codewords_are_those_of_the_description(width, seed, number):
    trits = ternary(np.random.default_rng(seed), 3, width, 0.85)
    codes, counts = encode(trits, table(number))
    plain_codewords, plain_counts = plain_codes.encode(trits, number)
    assert (codes.tolist(), counts.tolist()) == (plain_codewords, plain_counts)
    assert np.array_equal(plain_codes.decode(plain_codewords, plain_counts, number, width), trits)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(NUMBERS))
def test_a_row_alone_has_the_codewords_that_it_has_among_others(seed, number):
    trits = ternary(np.random.default_rng(seed), 5, 300, 0.9)
    codes, counts = encode(trits, table(number))
    start = counts[:2].sum()
    alone, count = encode(trits[2:3], table(number))
    assert np.array_equal(codes[start : start + counts[2]], alone) and count[0] == counts[2]
    assert np.array_equal(back(alone, count, number, 300), trits[2:3])


@pytest.mark.parametrize(("zero_share", "allowed"), [(0.885, 0.68), (0.90, 0.62), (0.95, 0.42)])
def test_rates_of_independent_weights(zero_share, allowed):
    trits = ternary(np.random.default_rng(1), 4, 500_000, zero_share)
    number = choose(zero_share)
    rate = 16 * len(encode(trits, table(number))[0]) / trits.size
    needed = entropy(np.array([np.sum(trits == symbol) for symbol in (-1, 0, 1)])) / trits.size
    assert needed < rate <= allowed
    assert rate == pytest.approx(expected(number, zero_share), rel=0.005)


def test_the_papers_code_has_the_papers_rate():
    trits = ternary(np.random.default_rng(2), 4, 500_000, 0.885)
    assert 16 * len(encode(trits, table(QMOE))[0]) / trits.size == pytest.approx(0.735, abs=0.001)


def test_values_of_any_type_come_back_bit_for_bit():
    trits = ternary(np.random.default_rng(3), 20, 333, 0.8)
    codes, counts = encode(trits, table(8))
    for dtype in (np.float16, np.float32):
        values = np.random.default_rng(4).standard_normal((20, 2)).astype(dtype)
        expected_weights = np.where(trits < 0, values[:, :1], np.where(trits > 0, values[:, 1:], dtype(0)))
        weights = decode(codes, counts, table(8), values, 333)
        assert weights.dtype == dtype and weights.tobytes() == expected_weights.tobytes()


@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_other_weights_are_refused(bad):
    trits = np.zeros((2, 5), np.int64)
    trits[1, 3] = bad
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        encode(trits, table(20))
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        encode(trits.astype(np.float32), table(20))


def test_a_row_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="65535 can be counted"):
        encode(np.ones((1, 700_000), np.int8), table(3))


def rows_match(phrases, width):
    """Whether phrases are those of one row."""
    joined = "".join(phrases)
    before_last = len(joined) - len(phrases[-1]) if phrases else -1
    return "" not in phrases and before_last < width <= len(joined) and not joined[width:].strip("0")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_codewords_reach_outside_the_matrix(data):
    """The loop runs uncompiled, where reading or writing outside an array raises."""
    number = data.draw(st.sampled_from([QMOE, 3, 110]))
    counts = np.array(data.draw(st.lists(st.integers(0, 4), max_size=4)), np.uint16)
    total = int(counts.sum())
    codes = np.array(data.draw(st.lists(st.integers(0, 65_535), min_size=total, max_size=total)), np.uint16)
    width = data.draw(st.integers(0, 60))
    start = np.cumsum(counts, dtype=np.int64) - counts
    values, out = np.ones((len(counts), 2), np.uint8), np.zeros((len(counts), width), np.uint8)
    known = len(plain_codes.phrases(number))
    wrong = encoding._decode.__wrapped__(codes, start, counts, table(number).entries, values, out)
    fits = [
        rows_match([plain_codes.phrases(number)[word] if word < known else "" for word in words], width)
        for words in (codes[first : first + count] for first, count in zip(start, counts, strict=True))
    ]
    assert wrong == (fits.index(False) if False in fits else -1)
    if wrong >= 0:
        with pytest.raises(ValueError, match="row"):
            decode(codes, counts, table(number), values, width)
