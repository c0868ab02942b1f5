"""The long run of the fuzzers: the generators and the property of tests/threats, without hypothesis between them.

Every input is a pure function of (seed, generator, number), so one that fails is made again from its record.

    python benchmarks/fuzz.py --examples 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from machine import command, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "threats"))

from fuzzing import GENERATORS, MEMORY_BYTES, check
from quick import SECONDS

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SHARES = {"header_of_bytes": 3, "header": 4, "index": 4, "config": 6, "provenance": 1, "recipe": 2}
MEASURED = 19  # every so many-th input has its memory measured; no divisor of the shares, so of every generator
STUCK_SECONDS = 30
RECORDED_FAILURES = 50


def main() -> None:
    """Draw, check, and write what happened as JSON; exit 5 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="The examples are shared among the seeds.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Stop after so long, if not done before.")
    options = parser.parse_args()
    started = time.perf_counter()
    tally = Tally()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        directory = Path(folder) / "model"
        directory.mkdir()
        signal.signal(signal.SIGALRM, stuck)
        for number in range(options.examples):
            seed = options.seed[number % len(options.seed)]
            tally.run(seed, kind_of(number // len(options.seed)), number // len(options.seed), directory)
            if time.perf_counter() - started > 60 * options.minutes:
                break
    document = {
        "schema": "moectl.fuzz/1",
        "command": command(),
        "machine": machine(),
        "property": f"works, or a MoectlError that names a file in printable words; {SECONDS} s CPU each, and "
        f"{MEMORY_BYTES} bytes in every {MEASURED}th, which is measured",
        "asked": options.examples,
        "examples": sum(tally.drawn.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "by_generator": {
            kind: {"examples": tally.drawn[kind], "accepted": tally.accepted[kind]} for kind in sorted(tally.drawn)
        },
        "failures": tally.failures,
        "failed": tally.failed,
        "slowest": tally.slowest,
        "largest": tally.largest,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{document['examples']} inputs in {document['seconds']} s, {tally.failed} failures -> {RESULTS}")
    sys.exit(5 if tally.failed else 0)


class Tally:
    """What was drawn and how it went."""

    def __init__(self) -> None:
        self.drawn, self.accepted = Counter[str](), Counter[str]()
        self.failed = 0
        self.failures: list[dict[str, Any]] = []
        self.slowest: dict[str, Any] = {"seconds": 0.0}
        self.largest: dict[str, Any] = {"bytes": 0}

    def run(self, seed: int, kind: str, number: int, directory: Path) -> None:
        """Draw one input and check it."""
        name = f"{seed}.{kind}.{number}"
        self.drawn[kind] += 1
        case = GENERATORS[kind](Random(name))
        signal.alarm(STUCK_SECONDS)
        try:
            outcome = check(case, directory, measure_memory=number % MEASURED == 0)
        except Exception as error:
            self.failed += 1
            if len(self.failures) < RECORDED_FAILURES:
                self.failures.append({"input": name, "error": type(error).__name__, "message": str(error)[:300]})
            return
        finally:
            signal.alarm(0)
        self.accepted[kind] += outcome.error is None
        if outcome.peak_bytes is None and outcome.seconds > self.slowest["seconds"]:
            self.slowest = {"seconds": round(outcome.seconds, 4), "input": name}
        if (outcome.peak_bytes or 0) > self.largest["bytes"]:
            self.largest = {"bytes": outcome.peak_bytes, "input": name}


def kind_of(number: int) -> str:
    """The generator of the number-th input: each gets its share."""
    place = number * 7 % sum(SHARES.values())
    for kind, share in SHARES.items():
        if place < share:
            return kind
        place -= share
    raise AssertionError


def stuck(*_: object) -> None:
    raise TimeoutError(f"not done after {STUCK_SECONDS} s")


if __name__ == "__main__":
    main()
