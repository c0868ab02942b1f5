"""Available memory: the least of what the host and every control group leave, over files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.layerwise.memory import available_memory

MIB = 1 << 20
HOST = 1000 * MIB


def machine(root: Path, membership: str | None, files: dict[str, str]) -> Path:
    """A root directory of a host with 1000 MiB available; `files` lie below sys/fs/cgroup."""
    process = root / "proc" / "self"
    process.mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal:       {4 * HOST // 1024} kB\nMemFree:        1 kB\nMemAvailable:   {HOST // 1024} kB\n"
        "HugePages_Total:       0\n"
    )
    if membership is not None:
        (process / "cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v2(group: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}"
    return {f"{group}memory.max": str(limit), f"{group}memory.current": str(used), f"{group}memory.stat": stat}


def v1(group: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"cache 7\nactive_file 7\nhierarchical_memory_limit {limit}\ntotal_inactive_file {cached}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{group}{name}": str(text) for name, text in zip(names, (limit, used, stat), strict=True)}


JOB = "0::/slurm/job_7/step_0\n"
DOCKER = "12:memory:/docker/abc\n11:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
NO_LIMIT = 9223372036854771712

CASES: dict[str, tuple[str | None, dict[str, str], int]] = {
    "no groups": (None, {}, HOST),
    "v2: no limit": (JOB, v2("slurm/job_7/step_0/", "max", 50 * MIB), HOST),
    "v2: more than the host has": (JOB, v2("slurm/job_7/step_0/", 5 * HOST, 50 * MIB), HOST),
    "v2: its own": (JOB, v2("slurm/job_7/step_0/", 300 * MIB, 50 * MIB), 250 * MIB),
    "v2: of a group above": (
        JOB,
        v2("slurm/job_7/step_0/", "max", MIB) | v2("slurm/job_7/", 200 * MIB, 50 * MIB) | v2("slurm/", "max", 60 * MIB),
        150 * MIB,
    ),
    "v2: cached pages are free": (JOB, v2("slurm/job_7/step_0/", 300 * MIB, 290 * MIB, 250 * MIB), 260 * MIB),
    "v2: used up": (JOB, v2("slurm/job_7/step_0/", 100 * MIB, 101 * MIB), 0),
    "v2: a container's own root": ("0::/\n", v2("", 300 * MIB, 50 * MIB), 250 * MIB),
    "v2: without statistics": ("0::/\n", {"memory.max": str(300 * MIB), "memory.current": str(50 * MIB)}, 250 * MIB),
    "v1: no limit": (DOCKER, v1("docker/abc/", NO_LIMIT, 50 * MIB), HOST),
    "v1: its own": (DOCKER, v1("docker/abc/", 300 * MIB, 50 * MIB), 250 * MIB),
    "v1: cached pages are free": (DOCKER, v1("docker/abc/", 300 * MIB, 290 * MIB, 250 * MIB), 260 * MIB),
    "v1: the host's path, seen from inside": (DOCKER, v1("", 300 * MIB, 50 * MIB), 250 * MIB),
    "v1: beside other controllers": (
        "3:cpuset,memory:/job\n1:name=systemd:/a:b\n",
        v1("job/", 300 * MIB, 50 * MIB),
        250 * MIB,
    ),
    "another group's": ("4:cpu:/job\n0::/job\n", v2("other/", MIB, 0) | v1("job/", MIB, 0), HOST),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_counts(case: str, tmp_path: Path) -> None:
    membership, files, expected = CASES[case]
    assert available_memory(machine(tmp_path, membership, files)) == expected


def test_here_it_is_a_plausible_number_of_bytes() -> None:
    assert MIB < available_memory() < 1 << 50
