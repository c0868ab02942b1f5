"""What is measured at every step: how evenly the experts are used, how fast it goes, and the file it is written to.

Shapes: E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from moectl.checkpoint.fs import FileSystem
from moectl.errors import UsageError
from moectl.text import escape
from moectl.training.routers import MoeBlock


@dataclass(frozen=True, slots=True)
class Metrics:
    """One step, counted from 1. Means are over the whole batch of all processes.

    Attributes:
        loss: of the language model alone, in nats per token.
        aux, z: balancing loss (1 when balanced) and z-loss, mean over the MoE layers; None in a dense model.
        grad_norm: of all gradients together, before clipping.
        lr: of what is trained beside the routers; `router_lr` where that is nothing.
        tokens_per_second, mfu: of this step, data included and checkpoints not. `mfu` is the share of the speed of a
            large matrix product on the same device, measured at the start of the run.
        load_cv, max_vio: per MoE layer, as `load_cv` and `max_vio` have them.
    """

    step: int
    loss: float
    aux: float | None
    z: float | None
    grad_norm: float
    lr: float
    router_lr: float
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float
    load_cv: tuple[float, ...]
    max_vio: tuple[float, ...]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


class MetricsFile:
    """The file of one line per step; opened at a step, it forgets what came after it.

    Raises:
        UsageError: the file holds something else.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"--metrics {escape(str(path))} holds something else than the steps of a training.",
                "It would be written over.",
                "Give another file, or remove this one.",
            ) from None
        work = path.with_name(path.name + ".writing")
        work.write_text("".join(kept))
        FileSystem().rename(work, path)
        self._file = path.open("a")

    def add(self, metrics: Metrics) -> None:
        """Append a step, visible to readers at once."""
        self._file.write(metrics.line())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def load_cv(load_E: Tensor) -> float:
    """Standard deviation over mean of the experts' loads: 0 when balanced, sqrt(E - 1) when one takes all."""
    load_E = load_E.double()
    return (load_E.std(correction=0) / load_E.mean()).item()


def max_vio(load_E: Tensor) -> float:
    """How far the busiest expert is above the mean load, relative to it (arXiv 2408.15664): 0 when balanced."""
    load_E = load_E.double()
    return (load_E.max() / load_E.mean() - 1).item()


def flops_per_token(model: nn.Module, blocks: Sequence[MoeBlock], top_k: int, sequence_length: int) -> int:
    """FLOPs of forward and backward per token: 6 per active weight, and 12 * layers * width * length for attention.

    The estimate of PaLM (arXiv 2204.02311, appendix B): an embedding that is only looked up does not count, K of a
    layer's E routed experts do, attention is not halved for causality, and frozen weights count like trained ones.
    """
    active = float(sum(parameter.numel() for parameter in model.parameters()))
    for block in blocks:
        experts = sum(parameter.numel() for parameter in block.experts.parameters())
        active -= experts * (1 - block.share(top_k, sequence_length))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        active -= embedding.weight.numel()
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return round(6 * active + 12 * config.num_hidden_layers * width * sequence_length)


def matmul_speed(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = perf_counter) -> float:
    """FLOP/s of a large square matrix product on the device: the best of those that fit into a third of a second."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    began, best, count = clock(), math.inf, 0
    while count < 5 or clock() - began < 0.3:
        started = clock()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
        count += 1
    return 2 * size**3 / best


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a metrics file; a line that was cut short when its writer was killed is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
