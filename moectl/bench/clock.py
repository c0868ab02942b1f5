"""Timing that favours nobody: rotated inputs, subjects interleaved in both orders, percentiles of what was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

MIN_REPS, MAX_REPS, ROUNDS = 11, 2000, 12


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        prepare: makes what call number n needs, outside the time.
        run: the timed call, given what `prepare` made.
        calls: how many layer calls one `run` is (a CUDA graph holds several).
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]
    calls: int = 1

    @classmethod
    def in_turn(cls, states: Sequence[Any], run: Callable[[Any], Any]) -> Subject:
        """Call number n is given state number n, round and round."""
        return cls(lambda n: states[n % len(states)], run)


@dataclass
class Sample:
    """Milliseconds per call: by the clock that was chosen, and by the other one of the two that a CPU has."""

    times: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    def percentiles(self) -> tuple[float, float, float]:
        """20th, 50th and 80th, linear between two times."""
        p20, p50, p80 = np.percentile(self.times, [20, 50, 80])
        return float(p20), float(p50), float(p80)

    def columns(self) -> dict[str, float]:
        """What a row says of the times."""
        p20, p50, p80 = self.percentiles()
        return {"p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "reps": len(self.times)}


class Clock(Protocol):
    """A way to time calls one by one."""

    def burst(self, subject: Subject, first: int, count: int) -> Sample:
        """Time calls number first..first+count-1."""
        ...


class WallClock:
    """The wall clock of a CPU, and the CPU time of the process beside it, which a busy machine disturbs less.

    With `cpu_time` the two change places: for one thread on a machine that is shared with others.
    """

    def __init__(self, cpu_time: bool = False) -> None:
        self.cpu_time = cpu_time

    def burst(self, subject: Subject, first: int, count: int) -> Sample:
        """Time calls number first..first+count-1."""
        sample = Sample()
        for n in range(first, first + count):
            state = subject.prepare(n)
            cpu, wall = time.process_time_ns(), time.perf_counter_ns()
            subject.run(state)
            sample.times.append((time.perf_counter_ns() - wall) / 1e6 / subject.calls)
            sample.other.append((time.process_time_ns() - cpu) / 1e6 / subject.calls)
        return Sample(sample.other, sample.times) if self.cpu_time else sample


class CudaClock:
    """CUDA events around every call, read after the burst: nothing waits for the GPU between calls."""

    def burst(self, subject: Subject, first: int, count: int) -> Sample:
        """Time calls number first..first+count-1."""
        pairs = []
        for n in range(first, first + count):
            state = subject.prepare(n)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            subject.run(state)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return Sample([start.elapsed_time(end) / subject.calls for start, end in pairs])


def interleave(
    subjects: dict[str, Subject],
    clock: Clock,
    seconds: float,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Sample]:
    """Time all subjects in turn, A B C, C B A, A B C, ..., for about `seconds` each.

    A subject is called twice before its first time counts. Fast ones are called several times in a row; a slow one gets
    at least MIN_REPS calls while they fit into three times `seconds`, and at least one. One that fails is dropped, and
    `on_failure` is told; without it the exception passes.
    """
    samples = {name: Sample() for name in subjects}
    wanted: dict[str, int] = {}

    @contextmanager
    def dropped_if_it_fails(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if on_failure is None:
                raise
            del samples[name]
            on_failure(name, error)

    for name, subject in subjects.items():
        with dropped_if_it_fails(name):
            clock.burst(subject, 0, 1)
            estimate = clock.burst(subject, 1, 1).times[0] * subject.calls / 1000
            wanted[name] = repetitions(estimate, seconds)
    for turn in range(ROUNDS):
        for name in list(samples)[:: 1 if turn % 2 == 0 else -1]:
            with dropped_if_it_fails(name):
                first, last = (wanted[name] * edge // ROUNDS for edge in (turn, turn + 1))
                seen = clock.burst(subjects[name], first, last - first)
                samples[name].times += seen.times
                samples[name].other += seen.other
    return samples


def repetitions(estimate: float, seconds: float) -> int:
    """How often to call something that takes `estimate` seconds when it may take about `seconds`."""
    fitting = seconds / max(estimate, 1e-9)
    if fitting >= MIN_REPS:
        return min(MAX_REPS, math.ceil(fitting))
    return max(1, min(MIN_REPS, math.floor(3 * fitting)))
