"""Who is timed when, how often, and what is made of it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moectl.bench.clock import MAX_REPS, MIN_REPS, Sample, Subject, WallClock, interleave, repetitions


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=50))
def test_percentiles_against_their_definition(times):
    ordered = sorted(times)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    assert Sample(times).percentiles() == pytest.approx((percentile(0.2), percentile(0.5), percentile(0.8)))


def test_repetitions():
    assert repetitions(0.001, 0.5) == 500 and repetitions(1e-9, 0.5) == MAX_REPS
    assert repetitions(0.05, 0.5) == MIN_REPS  # ten would fit, eleven are wanted
    assert repetitions(0.2, 0.5) == 7 and repetitions(5, 0.5) == 1


class Told:
    """A clock on which every call takes as many milliseconds as its subject says."""

    def __init__(self) -> None:
        self.bursts: list[tuple[float, int, int]] = []

    def burst(self, subject, first, count):
        took = subject.prepare(0)
        self.bursts.append((took, first, count))
        return Sample([took] * count)


def test_subjects_take_turns_in_both_orders():
    clock = Told()
    samples = interleave(
        {name: Subject(lambda _n, ms=ms: ms, print) for name, ms in [("a", 1), ("b", 2)]}, clock, 0.048
    )
    assert clock.bursts[:4] == [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1)]  # warm-up, which no sample holds
    turns = [(clock.bursts[i], clock.bursts[i + 1]) for i in range(4, len(clock.bursts), 2)]
    assert [first[0] for first, _ in turns] == [1, 2] * 6  # A B, B A, A B, ...
    assert all({first[0], second[0]} == {1, 2} for first, second in turns)
    assert samples["a"].times == [1] * 48 and samples["b"].times == [2] * 24
    places = [place for took, first, count in clock.bursts[4:] for place in range(first, first + count) if took == 1]
    assert places == list(range(48))  # every call gets its own inputs


def test_one_that_fails_is_dropped():
    """At once, and later: the others are timed as if it had not been there."""

    def late(_state, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("late")

    def early(_state):
        raise RuntimeError("early")

    failed = {}
    subjects = {name: Subject(lambda n: n, run) for name, run in [("e", early), ("l", late), ("good", lambda n: n)]}
    samples = interleave(subjects, WallClock(), 0.001, lambda name, error: failed.update({name: str(error)}))
    assert failed == {"e": "early", "l": "late"} and list(samples) == ["good"] and len(samples["good"].times) >= 11
    with pytest.raises(RuntimeError, match="early"):
        interleave(subjects, WallClock(), 0.001)


def test_preparing_is_not_timed_and_inputs_rotate():
    seen = []
    subject = Subject(lambda n: time.sleep(0.01) or n, seen.append, calls=4)
    sample = WallClock().burst(subject, 3, 5)
    assert seen == [3, 4, 5, 6, 7] and sorted(sample.times)[2] < 2


def test_cpu_time_does_not_count_waiting():
    subject = Subject(lambda _: None, lambda _: time.sleep(0.02))
    sample = WallClock(cpu_time=True).burst(subject, 0, 3)
    assert max(sample.times) < 10 and min(sample.other) >= 20
