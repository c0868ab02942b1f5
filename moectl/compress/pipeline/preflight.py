"""What a run will take, told before it starts: memory, disk, time, and the bits of what comes out.

Legend: E experts, R outputs, N inputs of a matrix, G experts of a batch, T calibration tokens, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moectl.checkpoint.fs import free_bytes
from moectl.checkpoint.source import Checkpoint
from moectl.compress.pipeline.settings import Settings
from moectl.compress.pipeline.stacks import candidates, experts_modules, is_direct
from moectl.errors import MachineError
from moectl.families.components import experts_and_top_k
from moectl.launched import rank_and_size
from moectl.layerwise.memory import available_memory, resident
from moectl.layerwise.pairs import Ids, parts
from moectl.layerwise.skeleton import all_layers, build
from moectl.report.output import size
from moectl.text import escape

if TYPE_CHECKING:
    from moectl.compress.quantise.method import Method

LOADING = 1.3
"""Memory of a layer while it is read, as a multiple of its size: 32 experts of 6 MB, float32 from bfloat16."""
_COPIES = 12
"""Copies of a batch's weights that GPTQ works on."""
_BASE = 600 << 20
"""What torch and transformers take, if nothing says what they do."""
_RUNNING = 64 << 20
"""What they take on top once a model has run and a matrix has been quantised (benchmarks/compress.py)."""
_SLOWER = 3.0
"""CPU seconds of a run over those of products of matrices with as many operations (ibid.)."""
_SPEED_SECONDS = 0.2


@dataclass(frozen=True)
class Estimate:
    """What a run will take; all of it roughly.

    Attributes:
        memory: bytes of one process at its peak, where the model computes.
        scratch: bytes on disk that are free again when it is done.
        output: bytes of the layer files, which stay until the output has been written.
        flops: of all processes together.
        seconds: from the speed of a product of matrices measured now.
        bits: per expert weight, on weights that are independent and Gaussian.
        experts: parameters of experts.
    """

    memory: int
    scratch: int
    output: int
    flops: float
    seconds: float
    bits: float
    experts: int


@dataclass(frozen=True)
class _Matrix:
    experts: int
    outputs: int
    inputs: int

    @property
    def numbers(self) -> int:
        return self.experts * self.outputs * self.inputs


@dataclass(frozen=True)
class _Layer:
    numbers: int
    matrices: list[_Matrix]
    direct: bool


def estimate(checkpoint: Checkpoint, tokens_BL: Ids, method: Method, settings: Settings) -> Estimate:
    """What `run` with the same arguments will take. Reads no weights.

    Raises:
        InputError: the model cannot be run layer by layer.
    """
    model = build(checkpoint, torch.float32, "meta", two_stacks=True)
    width = model.config.get_text_config(decoder=True).hidden_size
    layers = [_layer(name, module, width) for name, module in all_layers(checkpoint, model)[0].items()]
    top_k = experts_and_top_k(checkpoint.config)[1] or 1
    tokens = max(part.size for part in parts(tokens_BL))
    length = max(part.shape[1] for part in parts(tokens_BL))
    inputs = {matrix.inputs for layer in layers for matrix in layer.matrices}
    rates = {each: _bits(method, each) for each in inputs}
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    experts = sum(matrix.numbers for matrix in matrices)
    output = sum(matrix.numbers * rates[matrix.inputs] / 8 for matrix in matrices)
    if settings.dense is not None:
        output += (sum(parameter.numel() for parameter in model.parameters()) - experts) * settings.dense.bits / 8
    flops = sum(_flops(layer, tokens, top_k, settings) for layer in layers)
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.numbers for layer in layers)
    ranks = rank_and_size()[1]
    return Estimate(
        memory=max(_memory(layer, outside, length, width, settings) for layer in layers),
        scratch=max(_scratch(layer, tokens, width, top_k, settings) for layer in layers),
        output=int(output),
        flops=flops,
        seconds=_SLOWER * flops / _speed(settings) / ranks,
        bits=8 * sum(matrix.numbers * rates[matrix.inputs] / 8 for matrix in matrices) / max(1, experts),
        experts=experts,
    )


def require(found: Estimate, settings: Settings, folder: Path) -> None:
    """Refuse a run that memory or disk cannot hold; what a run before left in its folder counts as there.

    Raises:
        MachineError: says how much is needed and how much there is.
    """
    if torch.device(settings.device).type == "cuda":
        free, where = torch.cuda.mem_get_info(settings.device)[0], "on the GPU"
    else:
        free, where = available_memory() + (resident("VmRSS") or 0), "of memory"
    if found.memory > free:
        raise MachineError(
            f"Compressing takes about {size(found.memory)} {where}, and {size(free)} are free.",
            "It would be killed, hours from now maybe.",
            "Give a smaller --batch-experts, --dtype bfloat16 or shorter sequences, or use a larger machine.",
        )
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = free_bytes(folder) + there
    if found.scratch + found.output > free:
        raise MachineError(
            f"Compressing takes about {size(found.scratch + found.output)} of disk in {escape(str(folder.parent))}, "
            f"and {size(free)} are free.",
            "What the layers return on the calibration tokens is kept there, and what is made of the layers.",
            "Free space, give fewer --samples, or an -o on another disk.",
        )


def _layer(name: str, module: nn.Module, width: int) -> _Layer:
    numbers = sum(parameter.numel() for parameter in module.parameters())
    matrices = {key: value for key, value in candidates(name, module).items() if not key.endswith("bias")}
    found = [_matrix(key, parameter, width) for key, parameter in matrices.items()]
    return _Layer(numbers, found, is_direct(list(experts_modules(module).values())))


def _matrix(name: str, parameter: torch.Tensor, width: int) -> _Matrix:
    """Which side is the input follows from the name and the hidden size; a guess, good enough for sizes."""
    shape = parameter.shape
    if parameter.ndim == 2 and shape[0] > 8 * shape[1] and shape[1] == width:  # stacked along its rows
        return _Matrix(max(1, shape[0] // shape[1]), shape[1], shape[1])
    first, second = shape[-2:]
    other = second if first == width else first
    last = any(part in name.rpartition(".experts.")[2] for part in ("down", "w2", "wo", "fc2", "output"))
    return _Matrix(parameter.numel() // (first * second), *((width, other) if last else (other, width)))


def _memory(layer: _Layer, outside: int, length: int, width: int, settings: Settings) -> int:
    item = settings.dtype.itemsize
    batch = [min(settings.batch_experts, matrix.experts) for matrix in layer.matrices]
    hessians = sum(4 * g * matrix.inputs**2 for g, matrix in zip(batch, layer.matrices, strict=True))
    work = max(
        (
            4 * g * (_COPIES * matrix.outputs + 2 * matrix.inputs) * matrix.inputs
            for g, matrix in zip(batch, layer.matrices, strict=True)
        ),
        default=0,
    )
    codes = max((3 * matrix.numbers for matrix in layer.matrices), default=0)
    rows = settings.sequences(length) * length
    activations = 30 * rows * width * 4
    loaded = item * layer.numbers
    return int(
        (resident("VmRSS") or _BASE)
        + _RUNNING
        + item * outside
        + max(LOADING * loaded, loaded + max(hessians + work, codes, activations))
    )


def _scratch(layer: _Layer, tokens: int, width: int, top_k: int, settings: Settings) -> int:
    hidden = tokens * width * settings.dtype.itemsize
    given = hidden + tokens * top_k * 16
    codes = sum(matrix.numbers for matrix in layer.matrices)
    return 2 * hidden + given + codes


def _flops(layer: _Layer, tokens: int, top_k: int, settings: Settings) -> float:
    """Two passes, one more through the experts, X^T X for what each is given, and GPTQ."""
    stacked = sum(matrix.numbers for matrix in layer.matrices)
    total = 4.0 * tokens * (layer.numbers - stacked)
    for matrix in layer.matrices:
        active = min(1.0, top_k / max(2, matrix.experts))
        rows = tokens * (1.0 if settings.all_experts else active) * matrix.experts
        again = 1.0 if layer.direct else max(1.0, matrix.experts / settings.batch_experts)
        total += 2.0 * rows * matrix.outputs * matrix.inputs * (1 + again) + 2.0 * rows * matrix.inputs**2
        total += matrix.experts * (matrix.outputs * matrix.inputs**2 + matrix.inputs**3)
    return total


def _bits(method: Any, inputs: int) -> float:
    """Bits a weight of rows of so many independent Gaussian numbers, at the method's own word."""
    weight_GRN = torch.randn(1, 64, inputs, generator=torch.Generator().manual_seed(0))
    return float(method.quantise(weight_GRN, None, None)["bits_G"][0])


def _speed(settings: Settings) -> float:
    """Floating-point operations a second of a product of large matrices, where and as the model computes."""
    width = 512 if torch.device(settings.device).type == "cpu" else 8192
    a = torch.ones(width, width, dtype=settings.dtype, device=settings.device)
    count, started = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - started < _SPEED_SECONDS:
        (a @ a)[0, 0].item()
        count += 1
    return 2.0 * width**3 * count / (time.perf_counter() - started)
