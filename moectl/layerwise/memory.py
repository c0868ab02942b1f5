"""How much memory a process has taken and may still take: what the host has free, and its control groups leave of it.

A container or a batch job sees the host's /proc/meminfo, but is killed at its own limit. Files: `man 5 proc`,
https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a version's files; `cached` are lines of memory.stat."""

    mount: str
    limit: str
    usage: str
    cached: tuple[str, ...]


_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping or being killed: the least that the host and any group leave.

    The host's is Linux's own estimate, elsewhere all physical memory. A group's is its limit less its usage, where
    cached file pages do not count as used: reading a checkpoint fills the group with them, and they go when needed.
    """
    return max(0, min([_host(root / "proc/meminfo"), *_groups(root)]))


def resident(field: str) -> int | None:
    """Bytes of memory of this process: `VmRSS` now, `VmHWM` at most; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _host(meminfo: Path) -> int:
    if meminfo.exists():
        available = _table(meminfo).get("MemAvailable:")
        if available is not None:
            return available * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[int]:
    """What each group with a limit leaves, of those the process is in."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            files = _V2
        elif "memory" in controllers.split(","):
            files = _V1
        else:
            continue
        # Every group above limits it too. In a container the path may be the host's, and then only the mount is there.
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            left = _left(root / files.mount / group, files)
            if left is not None:
                yield left


def _left(group: Path, files: _Files) -> int | None:
    try:
        limit = (group / files.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((group / files.usage).read_text())
    except OSError:  # no such group from in here, or the root group, which has no limit
        return None
    statistics = group / "memory.stat"  # some sandboxes leave it out
    stat = _table(statistics) if statistics.exists() else {}
    return int(limit) - max(0, used - sum(stat.get(name, 0) for name in files.cached))


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
