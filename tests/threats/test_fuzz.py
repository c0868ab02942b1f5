"""Whatever lies in a checkpoint directory, reading it works or is refused by name: quickly, in little memory.

MOECTL_FUZZ_EXAMPLES is how many inputs are drawn over all generators; `benchmarks/fuzz.py` draws a million.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import fuzzing
import pytest
from fuzzing import GENERATORS, Case, check, tiny_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quick import SECONDS

from moectl.checkpoint.source import SINGLE
from moectl.errors import InputError
from moectl.families.registry import DENSE

EXAMPLES = int(os.environ.get("MOECTL_FUZZ_EXAMPLES", "10000"))
MEASURED = 20  # every so many-th input has its memory measured, which makes it several times slower
SHARES = {"header_of_bytes": 0.15, "header": 0.2, "index": 0.2, "config": 0.3, "provenance": 0.05, "recipe": 0.1}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """One directory, in memory where there is such a place, that every input is written into."""
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="moectl-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    (parent / "model").mkdir()
    yield parent / "model"
    shutil.rmtree(parent)


@pytest.mark.parametrize("kind", GENERATORS)
def test_it_works_or_is_refused_by_name(
    kind: str, directory: Path, record_property: Callable[[str, object], None]
) -> None:
    counts = {"drawn": 0, "refused": 0}

    @settings(
        max_examples=max(1, int(EXAMPLES * SHARES[kind])),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def holds(seed: int) -> None:
        counts["drawn"] += 1
        case = GENERATORS[kind](Random(seed))
        outcome = check(case, directory, measure_memory=counts["drawn"] % MEASURED == 0)
        counts["refused"] += outcome.error is not None

    holds()
    record_property("fuzz inputs", counts["drawn"])
    assert counts["refused"] > counts["drawn"] // 20, f"the generator draws too little that is wrong: {counts}"


@settings(max_examples=max(1, EXAMPLES // 20), deadline=None, database=None, derandomize=True)
@given(content=st.binary(max_size=400), name=st.sampled_from([SINGLE, "config.json", "model.safetensors.index.json"]))
def test_bytes_that_hypothesis_likes(content: bytes, name: str) -> None:
    """No generator of ours between hypothesis and the file, so that it can shrink what it finds."""
    with tempfile.TemporaryDirectory() as folder:
        check(Case({**tiny_files("qwen3"), name: content}), Path(folder))


@pytest.mark.parametrize("family", sorted(DENSE))
def test_the_untouched_checkpoint_is_accepted(family: str, directory: Path) -> None:
    """Else every mutation of it would be refused for the same reason."""
    assert check(Case(tiny_files(family)), directory).error is None


def test_what_the_property_would_catch(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another kind, an error without a name, one with an escape, and too much time or memory."""
    case = Case(tiny_files("llama"))

    def planted(effect: object) -> None:
        monkeypatch.setattr(fuzzing, "use", effect)

    def stops(error: Exception) -> object:
        def use(*_: object) -> None:
            raise error

        return use

    planted(stops(KeyError("shape")))
    with pytest.raises(KeyError):
        check(case, directory)
    planted(stops(InputError("Something is wrong.")))
    with pytest.raises(AssertionError, match="names no file"):
        check(case, directory)
    planted(stops(InputError("config.json holds \x1b.")))
    with pytest.raises(AssertionError, match="control characters"):
        check(case, directory)
    planted(lambda *_: burn(1.1 * SECONDS))
    with pytest.raises(AssertionError, match="took"):
        check(case, directory)
    planted(lambda *_: bytearray(2 * 10**8))
    with pytest.raises(AssertionError, match="bytes"):
        check(case, directory, measure_memory=True)


def burn(seconds: float) -> None:
    """Use a CPU for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_slow_first_time_is_no_slow_input(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a first import falls on it; what `check` then reports is the second time."""
    waits = [1.1 * SECONDS, 0.0]
    monkeypatch.setattr(fuzzing, "use", lambda *_: burn(waits.pop(0)))
    assert check(Case(tiny_files("llama")), directory).seconds < SECONDS
    assert not waits


FOUND_BY_LONG_RUNS = ("11.recipe.5757", "12.config.81622", "12.config.218542", "11.recipe.69034", "11.recipe.323437")


@pytest.mark.parametrize("name", FOUND_BY_LONG_RUNS)
def test_what_the_long_runs_found_stays_mended(name: str, directory: Path) -> None:
    """Inputs of benchmarks/fuzz.py that once ended in a traceback or an endless message."""
    check(GENERATORS[name.split(".")[1]](Random(name)), directory, measure_memory=False)
