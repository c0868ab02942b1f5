"""What a result has to say about where it came from."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import threading
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
    """The command line of this run, paths cut to their names."""
    script = Path("benchmarks", Path(sys.argv[0]).name)
    return " ".join(["python", str(script), *(Path(word).name if "/" in word else word for word in sys.argv[1:])])


@dataclass(frozen=True, slots=True)
class Run:
    """One finished child process: wall and CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak_rss: int
    stdout: str


def run(arguments: list[str], **options: Any) -> Run:
    """Run a child to its end and measure it; raises if it fails.

    The peak is VmHWM, read while the child runs: ru_maxrss would also hold what this process had before the exec.
    """
    started = time.perf_counter()
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch_peak, args=(child.pid, peak, done))
    watcher.start()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, errors = child.communicate()
    wall = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    done.set()
    watcher.join()
    if child.returncode:
        raise RuntimeError(f"{arguments[0]} ended with status {child.returncode}:\n{errors[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, peak[0], text)


def _watch_peak(pid: int, peak: list[int], done: threading.Event) -> None:
    """Keep the highest VmHWM of the process in `peak`, every 5 ms from its exec to its end."""
    status = Path(f"/proc/{pid}/status")
    while not done.wait(0.005):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        peak[0] = max([peak[0], *values])
