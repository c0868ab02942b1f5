"""Runs every module of interpreted/ in a process of its own: a kernel that writes out of bounds may take it down.

The interpreter has to be chosen before Triton is imported, and must not reach the other tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_in_the_interpreter(module: Path, record_property: Any) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(module)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert not re.search(r"skipped|xfailed", run.stdout.splitlines()[-1]), run.stdout
    record_property("kernel tests in the interpreter", int(passed[1]))
