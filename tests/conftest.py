"""Shared set-up: quiet libraries, no network, helper modules beside the tests that use them, and a count at the end.

A test counts with `record_property`: an integer is added up over the tests that passed; a text under "pair" names the
pair of families it is about, which is exact when none of its tests failed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it, and so their children
for directory in ("checkpoint", "cli", "compress", "integrations", "traces", "../benchmarks"):
    sys.path.insert(0, str(Path(__file__).parent / directory))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests counted: moments of a crash, inputs of a fuzzer, pairs that are exact."""
    totals = Counter[str]()
    pairs: dict[str, bool] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "pair":
                    pairs[value] = pairs.get(value, True) and outcome == "passed"
                elif outcome == "passed":
                    totals[name] += value
    for name, count in sorted(totals.items()):
        terminalreporter.write_line(f"{name}: {count}")
    if pairs:
        from moectl.families.registry import PAIRS

        terminalreporter.write_line(f"pairs exact: {sum(pairs.values())} of {len(PAIRS)} listed")
