"""What the device is: the one file that asks."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448}
"""Tables of launch choices, and the bytes of shared memory a block may use with them (CUDA C++ programming guide, table
of technical specifications). sm_80's is for all that have no table of their own, so it keeps to the least of theirs."""


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        arch: the tuning table it takes, `sm_90` and the like.
        name: the device's own name, the key of the user's own tuning.
    """

    arch: str
    name: str


def interpreting() -> bool:
    """Whether Triton kernels are run by its interpreter, which takes tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are the ones for this tensor's device.

    Raises:
        ImportError: the tensor is on a GPU and Triton is not installed.
    """
    if not tensor.is_cuda:
        return tensor.device.type == "cpu" and interpreting()
    if not has_triton():
        raise ImportError("Expert kernels on a GPU need Triton: pip install triton, or choose another implementation.")
    return True


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def of(tensor: Tensor) -> Target:
    """The device of a tensor."""
    return _cuda(tensor.device.index) if tensor.is_cuda else Target("interpreter", "interpreter")


@cache
def _cuda(index: int) -> Target:
    major, _ = torch.cuda.get_device_capability(index)
    arch = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
    return Target(arch, torch.cuda.get_device_name(index))


def arch_number(arch: str) -> int:
    """90 for `sm_90`."""
    return int(arch.removeprefix("sm_"))


def float32_precision() -> str:
    """How a dot of float32 is done, as torch's own matrix products are told: "ieee" or "tf32"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, for a kernel launch."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
