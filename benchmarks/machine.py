"""What a result has to say about where it came from."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and the versions that matter."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "moectl": version("moectl"),
    }


def command() -> str:
    """The command line of this run, without where the interpreter lies."""
    return " ".join(["python", *sys.argv])


@dataclass(frozen=True, slots=True)
class Run:
    """One finished child process: wall and CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak_rss: int
    stdout: str


def run(arguments: list[str], **options: Any) -> Run:
    """Run a child to its end and measure it; raises if it fails."""
    started = time.perf_counter()
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    stdout, stderr = child.stdout, child.stderr
    assert stdout is not None and stderr is not None
    text, errors = stdout.read(), stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{arguments[0]} ended with status {status}:\n{errors[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


def own_peak_rss() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
