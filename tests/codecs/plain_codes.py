"""The codes of docs/format-qmoe.md once more, in plain Python over strings of "0", "+" and "-": slow, independent."""

from __future__ import annotations

import heapq
from functools import cache

import numpy as np

SYMBOLS = {0: "0", 1: "+", -1: "-"}
WEIGHTS = {symbol: weight for weight, symbol in SYMBOLS.items()}


@cache
def tunstall_phrases(ratio: int) -> list[str]:
    """The phrases of a tree, by codeword."""
    waiting, codewords, expansions, cost = {0: [""]}, [], 32_767, 0
    while waiting:
        grown = []
        for phrase in waiting.pop(cost, []):
            if expansions and len(phrase) < 255 and len(phrase) - phrase.count("0") < 6:
                expansions -= 1
                grown.append(phrase)
            else:
                codewords.append(phrase)
        if grown:
            waiting.setdefault(cost + ratio, []).extend([phrase + sign for sign in "+-" for phrase in grown])
            waiting.setdefault(cost + 1, []).extend([phrase + "0" for phrase in grown])
        cost += 1
    return codewords


@cache
def qmoe_phrases() -> list[str]:
    """The phrases of the paper's dictionary: the best of a heap of (-probability, pairs), until there are enough."""
    zero = 0.885
    single = [zero, (1 - zero) / 2, (1 - zero) / 2]
    pair = [second * first for second in single for first in single]
    heap, found = [(-1.0, [])], []
    while len(found) < 65_536:
        negative, pairs = heapq.heappop(heap)
        if pairs:
            found.append(pairs)
        if len(pairs) < 14 and -negative > 1e-5:
            for number, chance in enumerate(pair):
                heapq.heappush(heap, (negative * chance, [*pairs, number]))
    return ["".join("0-+"[number % 3] + "0-+"[number // 3] for number in pairs) for pairs in found]


def phrases(number: int) -> list[str]:
    """The phrases of a table."""
    return tunstall_phrases(number) if number else qmoe_phrases()


@cache
def _codewords(number: int) -> tuple[dict[str, int], set[str]]:
    """The codeword of each phrase, and all that phrases begin with."""
    codeword_of = {phrase: codeword for codeword, phrase in enumerate(phrases(number))}
    beginnings: set[str] = set()
    for phrase in codeword_of:
        while phrase not in beginnings:
            beginnings.add(phrase)
            phrase = phrase[:-1]
    return codeword_of, beginnings


def encode(trits_RN: np.ndarray, number: int) -> tuple[list[int], list[int]]:
    """Codewords of all rows and how many each has."""
    codeword_of, beginnings = _codewords(number)
    codes, counts = [], []
    for row in trits_RN.tolist():
        text, before = "".join(SYMBOLS[trit] for trit in row), len(codes)
        while text:
            length = len(text)
            if text in beginnings:
                while text not in codeword_of:
                    text += "0"
                length = len(text)
            while text[:length] not in codeword_of:
                length -= 1
            codes.append(codeword_of[text[:length]])
            text = text[length:]
        counts.append(len(codes) - before)
    return codes, counts


def decode(codes: list[int], counts: list[int], number: int, width: int) -> np.ndarray:
    """The weights of codewords."""
    words, rows = iter(codes), []
    for count in counts:
        text = "".join(phrases(number)[next(words)] for _ in range(count))
        assert set(text[width:]) <= {"0"}
        rows.append([WEIGHTS[symbol] for symbol in text[:width]])
    return np.array(rows, np.int8).reshape(len(counts), width)
