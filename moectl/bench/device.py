"""What the numbers were measured on: device, versions, the roof reached in the same run."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moectl.bench.clock import Clock, CudaClock, Subject, WallClock
from moectl.errors import MachineError, UsageError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Roof:
    """What this device did when asked for nothing else: the highest of what was seen before and after the run.

    Attributes:
        dtype: of the product.
        tflops: a large square product of random numbers, TFLOP/s.
        gbs: a large copy, GB/s, counting bytes read and written.
        before, after: the two (TFLOP/s, GB/s) that were seen.
    """

    dtype: str
    tflops: float
    gbs: float
    before: tuple[float, float]
    after: tuple[float, float]

    @classmethod
    def of(cls, dtype: str, before: tuple[float, float], after: tuple[float, float]) -> Roof:
        """The higher of two measurements."""
        return cls(dtype, max(before[0], after[0]), max(before[1], after[1]), before, after)

    def to_json(self) -> dict[str, Any]:
        """For the document."""
        return asdict(self)


def pick(name: str) -> torch.device:
    """The device that `--device` means; auto is the GPU where there is one.

    Raises:
        MachineError: cuda was asked for and is not there.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise MachineError("--device cuda: torch sees no CUDA device.", "", "Use --device cpu, or another machine.")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def clock_of(device: torch.device, name: str = "wall") -> Clock:
    """The clock that is right for the device; "cpu" counts the CPU time of one thread.

    Raises:
        UsageError: CPU time of a GPU, or of several threads, which would add them up.
    """
    if name == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UsageError("--clock cpu is for one thread on a CPU.", "", "Add --device cpu --threads 1.")
    return CudaClock() if device.type == "cuda" else WallClock(cpu_time=name == "cpu")


def measure_roof(dtype: torch.dtype, device: torch.device, clock: Clock) -> tuple[float, float]:
    """TFLOP/s of a large product in `dtype` and GB/s of a large copy: the best fifth of a few tries."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    elements = min(2**30, free_bytes(device) // 64) if cuda else 2**25  # 4 GiB and 128 MiB: beyond any cache
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    product = _best(Subject(lambda _: None, lambda _: torch.mm(left, right, out=out)), clock)
    copy = _best(Subject(lambda _: None, lambda _: target.copy_(source)), clock)
    return 2 * size**3 / product / 1e9, 2 * source.nbytes / copy / 1e6


def _best(subject: Subject, clock: Clock) -> float:
    """Milliseconds: the 20th percentile of what fits into a third of a second, after a warm-up."""
    clock.burst(subject, 0, 2)
    started, sample = time.monotonic(), clock.burst(subject, 0, 4)
    while time.monotonic() - started < 0.3:
        sample.times += clock.burst(subject, 0, 4).times
    return sample.percentiles()[0]


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of the GPU, L3 of the CPU (32 MiB where it is not told)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise MachineError("/proc/meminfo does not tell the free memory.", "", "Use a Linux machine.")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, for the document."""
    versions = {"python": platform.python_version()}
    for package in ("moectl", "torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
            "cuda": torch.version.cuda,
            "versions": versions,
        }
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
