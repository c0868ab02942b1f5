"""Tables are what docs/format-qmoe.md says, hold what a code must hold, and suit the sparsity they are chosen for."""

import hashlib
import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import plain_codes
import pytest

from moectl.codecs.entries import CODES, SLOTS, UNUSED
from moectl.codecs.rate import expected
from moectl.codecs.tables import QMOE, RATIOS, choose, table

PAGE = (Path(__file__).parents[2] / "docs" / "format-qmoe.md").read_text()


@cache
def phrases_of(number):
    """The phrases of a table's entries as strings, by codeword."""
    byte_N8 = table(number).entries.astype("<i8").view(np.uint8).reshape(-1, 8)
    found = []
    for length, *offsets, signs in byte_N8.tolist():
        symbols = ["0"] * length
        for slot, offset in enumerate(offsets):
            if length and offset != UNUSED:
                symbols[offset] = "-+"[signs >> slot & 1]
        found.append("".join(symbols))
    return found


def walked(number, phrase):
    """The node a phrase leads to."""
    node = table(number).root
    for symbol in phrase:
        node = table(number).children[node, plain_codes.WEIGHTS[symbol] & 3]
    return node


@pytest.mark.parametrize("number", [QMOE, 3, 20, 60, 255])
def test_phrases_are_those_of_the_description(number):
    described = plain_codes.phrases(number)
    assert phrases_of(number) == described + [""] * (CODES - len(described))


def test_the_papers_dictionary_has_its_lengths_and_all_beginnings_of_its_phrases():
    phrases = phrases_of(QMOE)
    lengths = np.bincount([len(phrase) // 2 for phrase in phrases])
    assert lengths.tolist() == [0, 9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    assert {phrase[:-2] for phrase in phrases} <= {"", *phrases}


@pytest.mark.parametrize("number", RATIOS)
def test_a_tree_parses_everything_in_one_way_and_spends_its_codewords_on_the_likeliest(number):
    tree = table(number)
    used = tree.entries[tree.lengths > 0]
    assert len(used) == CODES - 1
    lengths, times = np.unique(used & 255, return_counts=True)
    kraft = sum(Fraction(int(count), 3 ** int(length)) for length, count in zip(lengths, times, strict=True))
    assert kraft == 1
    byte_N8 = used.astype("<i8").view(np.uint8).reshape(-1, 8)
    signs = (byte_N8[:, 1 : 1 + SLOTS] != UNUSED).sum(1)
    cost = byte_N8[:, 0] + signs * (number - 1)
    assert (np.diff(cost) >= 0).all()
    can_grow = (byte_N8[:, 0] < UNUSED) & (signs < SLOTS)
    parents = cost - np.where(
        byte_N8[:, 1:7].max(1, where=byte_N8[:, 1:7] < UNUSED, initial=0) + 1 == byte_N8[:, 0], number, 1
    )
    assert parents.max() <= cost[can_grow].min()


@pytest.mark.parametrize("number", [QMOE, 3, 34, 200])
def test_the_tree_ends_each_phrase_at_its_codeword_and_zeros_lead_from_every_node_to_one(number):
    for codeword in np.random.default_rng(0).integers(0, CODES - 1, 300):
        assert walked(number, phrases_of(number)[codeword]) == codeword
    children = table(number).children
    nodes = np.arange(CODES, len(children))
    for _ in range(UNUSED):
        nodes = children[nodes[nodes >= CODES], 0]
    assert (nodes < CODES).all()


def test_the_chosen_tree_costs_at_most_seven_thousandths_more_than_the_best():
    shares = np.array([0.5, 0.6, 0.7, 0.8, 0.85, 0.885, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99])
    for share in shares:
        fitting = round(np.log((1 - share) / 2) / np.log(share))
        best = min(expected(ratio, share) for ratio in {*RATIOS, min(255, max(1, fitting))})
        assert expected(choose(share), share) <= 1.007 * best, share
    assert choose(0.0) == RATIOS[0] and choose(1.0) == RATIOS[-1]


def test_there_is_no_table_beyond_the_largest_ratio():
    for number in (-1, 256, 2**31 - 1):
        with pytest.raises(ValueError, match="no code table"):
            table(number)


def test_the_page_has_the_hashes_of_the_tables():
    rows = re.findall(r"^\| (\d+) \| `([0-9a-f]{16})` \|", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [QMOE, *RATIOS]
    for number, digest in rows:
        assert hashlib.sha256(table(int(number)).entries.astype("<i8").tobytes()).hexdigest()[:16] == digest
