"""Every launch that the host code makes, recorded without a GPU and compiled ahead of time.

The expert layer runs on tensors of the meta device, which have sizes and no memory, while a recorder stands where
Triton launches a kernel. What it saw (types, strides, constants, warps, stages) is what Triton's compiler is given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_kernels import target
from moe_kernels.target import arch_number

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with what it is specialised on: types by name, constants by place, and the compiler's options."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel and its file, and the tile where it has one."""
        values = {self.kernel.arg_names[place]: value for place, value in self.constants}
        sides = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_R", "BLOCK_C", "SLOTS")
        tile = [str(values[name]) for name in sides if name in values]
        flags = [
            name for name in ("GATHER", "GATHER_A", "GATHER_B", "GATED", "SAVE", "BIAS") if values.get(name) is True
        ]
        module = self.kernel.fn.__module__.rsplit(".", 1)[-1]
        words = [f"{module}.{self.kernel.fn.__name__}", "x".join(tile), f"{self.warps} warps", *flags]
        return " ".join(word for word in words if word)


@contextmanager
def recorded(arch: str) -> Iterator[dict[Launch, None]]:
    """The different launches of what runs inside, in order, as if on a GPU of this architecture."""
    seen: dict[Launch, None] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.setdefault(launch(self, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(target, "uses_triton", lambda tensor: True),
        mock.patch.object(target, "of", lambda tensor: target.Target(arch, "none")),
    ):
        yield seen


def launch(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton would specialise this call on: ones and None are constants, multiples of 16 are known as such."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    signature, constants, aligned = [], [], []
    for place, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((place, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, TYPES[value.dtype]))
            aligned.append(place)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [place] if value % 16 == 0 else []
    return Launch(
        kernel,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        kwargs.get("num_warps", 4),
        kwargs.get("num_stages", 3),
    )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and spilled bytes a thread, shared bytes; and whether it has wgmma."""

    registers: int
    spilled: int
    shared: int
    wgmma: bool


def compiled(call: Launch, arch: str) -> Resources:
    """Compile for an architecture and read the machine code's own account of itself."""
    source = ASTSource(
        call.kernel,
        dict(call.signature),
        {(place,): value for place, value in call.constants},
        {(place,): [["tt.divisibility", 16]] for place in call.aligned},
    )
    options = {"num_warps": call.warps, "num_stages": call.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch_number(arch), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage.stdout)[1]) for word in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, kernel.metadata.shared, "wgmma.mma_async" in kernel.asm["ptx"])
