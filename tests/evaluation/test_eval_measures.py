"""Loss, bits per byte, intervals and conditions, against sums by hand and simulations whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moectl.bootstrap import interval, resampled_sums
from moectl.errors import InputError, UsageError
from moectl.evaluation import gate
from moectl.evaluation.domains import Scores, ensemble, heldout_texts, measure
from moectl.evaluation.run import labels

TEXTS = {"latin": ["héé", "ab"], "greek": ["λόγος"]}  # 5 + 2 bytes, 10 bytes
TOKENS = {"latin": [[1, 2, 3], [4, 5]], "greek": [[6, 7, 8, 9, 10]]}


def scores(name: str, latin: list[list[float]], greek: list[list[float]]) -> Scores:
    return Scores(
        name, TOKENS, {"latin": [-np.array(row) for row in latin], "greek": [-np.array(row) for row in greek]}
    )


A = scores("a", [[1.0, 2.0, 3.0], [0.5, 0.5]], [[1.0] * 5])
B = scores("b", [[1.0, 1.0, 3.0], [0.5, 0.0]], [[2.0] * 5])


def test_sums_by_hand() -> None:
    first, second = measure([A, B], TEXTS)
    assert list(first) == ["latin", "greek", "mean"]
    assert first["latin"].loss == pytest.approx(7 / 5) and first["latin"].tokens == 5
    assert first["latin"].perplexity == pytest.approx(math.exp(7 / 5))
    assert first["latin"].bits_per_byte == pytest.approx(7 / 7 / math.log(2))
    assert second["latin"].difference == pytest.approx((5.5 - 7) / 7 / math.log(2))
    assert first["greek"].bits_per_byte == pytest.approx(5 / 10 / math.log(2))
    assert first["mean"].loss == pytest.approx((7 / 5 + 1) / 2) and first["mean"].tokens == 10
    assert second["mean"].difference == pytest.approx(second["mean"].bits_per_byte - first["mean"].bits_per_byte)
    assert first["greek"].loss_interval is None, "one document says nothing of others"
    assert first["mean"].loss_interval is None and first["latin"].difference_interval == (0.0, 0.0)
    low, high = second["latin"].loss_interval or (0, 0)
    assert low == pytest.approx(0.5 / 2) and high == pytest.approx(5 / 3), "two documents: one of them alone"


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """The same probability of the same text, in one token or in many."""
    whole = Scores("words", {"d": [[1]]}, {"d": [np.array([-6.0])]})
    pieces = Scores("bytes", {"d": [[1, 2, 3]]}, {"d": [np.array([-1.0, -2.0, -3.0])]})
    one, other = measure([whole, pieces], {"d": ["héé"]})
    assert one["d"].bits_per_byte == pytest.approx(other["d"].bits_per_byte) == pytest.approx(6 / 5 / math.log(2))
    assert one["d"].loss == pytest.approx(3 * other["d"].loss)
    with pytest.raises(UsageError, match="words and bytes cut the text into different tokens"):
        ensemble([whole, pieces], "uniform")
    with pytest.raises(UsageError, match="there are 1"):
        ensemble([whole], "uniform")


def documents(generator: np.random.Generator, number: int) -> np.ndarray:
    """Nats of two models and tokens [3, D]; the second model is 0.01 nats better on documents of very unequal loss."""
    tokens = generator.integers(5, 200, number).astype(float)
    rate = generator.gamma(4.0, 0.5, number)  # mean 2, independent of length, so the true ratio is 2
    return np.stack([rate * tokens, (rate - 0.01 + 0.002 * generator.standard_normal(number)) * tokens, tokens])


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = paired = 0
    for trial in range(200):
        sums = resampled_sums(documents(generator, 60), trial, resamples=400)
        low, high = interval(sums[:, 0] / sums[:, 2])
        covered += low <= 2.0 <= high
        low, high = interval((sums[:, 1] - sums[:, 0]) / sums[:, 2])
        paired += low <= -0.01 <= high
        assert high - low < 0.005, "pairing takes away what documents have in common"
    assert 0.88 <= covered / 200 <= 0.99 and 0.88 <= paired / 200 <= 0.99


def test_resampling_is_by_document_and_reproducible() -> None:
    values = np.array([[1.0, 10.0, 100.0], [1.0, 1.0, 1.0]])
    sums = resampled_sums(values, seed=5, resamples=50)
    possible = {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}
    assert sums.shape == (50, 2) and set(sums[:, 0]) <= possible and set(sums[:, 1]) == {3.0}
    assert np.array_equal(sums, resampled_sums(values, seed=5, resamples=50))
    assert not np.array_equal(sums, resampled_sums(values, seed=6, resamples=50))


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="bad gives no finite loss on 'latin'"):
        measure([A, scores("bad", [[1.0, math.nan, 1.0], [1.0, 1.0]], [[1.0] * 5])], TEXTS)


@pytest.mark.parametrize(
    ("condition", "failing"),
    [
        ("loss>1.1", ["a", "b"]),
        ("loss > 1.3", ["b"]),
        ("latin.loss<=1.1", ["b"]),
        ("greek.bits_per_byte>=1", ["b"]),
        ("difference>0", ["b"]),
        ("greek.perplexity<1e1", ["a", "b"]),
        ("loss>2", []),
    ],
)
def test_conditions_fail_the_models_they_are_true_of(condition: str, failing: list[str]) -> None:
    lines = gate.failures(gate.parse(condition), ["a", "b"], measure([A, B], TEXTS))
    assert [line.partition(":")[0] for line in lines] == failing


@pytest.mark.parametrize("condition", ["", "loss", "loss>", "loss>x", "speed>1", "loss=1", "loss>1>2", "loss>--1"])
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UsageError, match="is no condition"):
        gate.parse(condition)


def test_a_condition_on_a_domain_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="names the domain 'dutch'"):
        gate.failures(gate.parse("dutch.loss>1"), ["a"], measure([A], TEXTS))


def test_texts_stop_near_the_limit_and_are_the_same_for_every_model() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    few = heldout_texts(["builtin:arithmetic"], encode, 1000)["arithmetic"]
    many = heldout_texts(["builtin:arithmetic"], encode, 3000)["arithmetic"]
    assert sum(len(encode(text)) for text in few) == 1000 and sum(len(encode(text)) for text in many) == 3000
    assert many[: len(few) - 1] == few[:-1] and many[len(few) - 1].startswith(few[-1])


def test_a_domain_cannot_be_called_mean(tmp_path: Path) -> None:
    (tmp_path / "mean.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(40)))
    with pytest.raises(InputError, match="called 'mean'"):
        heldout_texts([str(tmp_path / "mean.jsonl")], lambda text: list(text.encode()), 10)


def test_models_have_names_that_differ() -> None:
    assert labels(["a/x", "b/y/"]) == ["x", "y"]
    assert labels(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "y"]
    assert labels(["m", "m"]) == ["m (1)", "m (2)"]
