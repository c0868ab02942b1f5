"""The implementations that are compared: one file each, loaded only when it is its turn, and one line below.

A peer's file has `build(weights) -> Layer`. What it raises becomes the reason in its row; `Unavailable` says it nicely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from moectl.bench.inputs import Weights
from moectl.errors import UsageError
from moectl.text import shown


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A peer around given weights.

    Attributes:
        call: (x [T, D], index [T, K] int64, weight [T, K]) -> y [T, D].
        parameters: the tensors that gradients are asked for; empty when it only runs forward.
        canonical: from the gradients of `parameters` to those of gate_up [E, 2F, D] and down [E, D, F].
        block_m: rows of its blocks for a number of routed rows, where it pads to blocks and says so.
        copied: bytes of weights that one call with T tokens copies.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()
    canonical: Callable[..., tuple[Tensor, Tensor]] = lambda gate_up, down: (gate_up, down)
    block_m: Callable[[int], int | None] = lambda _rows: None
    copied: Callable[[int], int] = lambda _tokens: 0


@dataclass(frozen=True)
class Peer:
    """A name on the command line: the module with its `build`, what it needs, and whether it is this project's."""

    module: str
    about: str
    ours: bool = False


PEERS = {
    "moectl": Peer("ours", "moe_kernels.expert_mlp: Triton on CUDA, torch on a CPU", ours=True),
    "moectl-packed": Peer("ours_packed", "moe_kernels.cpu with weights packed once, for inference on a CPU", ours=True),
    "grouped_mm": Peer("transformers_grouped_mm", "transformers' default, torch's grouped_mm"),
    "eager": Peer("transformers_eager", "transformers' loop over experts"),
    "batched_mm": Peer("transformers_batched_mm", "transformers' bmm over copied weights"),
    "loop": Peer("loop", "the plain torch loop of moe_kernels.reference"),
    "sonicmoe": Peer("transformers_sonicmoe", "transformers' sonicmoe (needs `kernels`, nvidia-cutlass-dsl)"),
    "deepgemm": Peer("transformers_deepgemm", "transformers' deepgemm (needs `kernels`)"),
    "scattermoe": Peer("scattermoe", "github.com/shawntan/scattermoe"),
    "megablocks": Peer("megablocks", "megablocks, grouped dMoE"),
    "grouped_gemm": Peer("grouped_gemm", "github.com/tgale96/grouped_gemm between torch's permutes"),
    "liger": Peer("liger", "liger-kernel's LigerFusedMoEFunction"),
    "vllm": Peer("vllm", "vLLM's fused_experts"),
    "triton_kernels": Peer("triton_kernels", "triton_kernels' ragged matmul"),
    "tutel": Peer("tutel", "Tutel's encode, experts and decode"),
    "fastmoe": Peer("fastmoe", "FastMoE's scatter, linears and gather"),
}
"""In the order of the rows. Speed-ups are over the first of them that is not this project's."""


def choose(text: str) -> list[str]:
    """Names from `a,b,c`, or all.

    Raises:
        UsageError: there is no such peer.
    """
    names = (
        list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip())) if text != "all" else list(PEERS)
    )
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise UsageError(
            f"--backend {shown(', '.join(unknown) or text)} is not a backend.", "", f"There are {', '.join(PEERS)}."
        )
    return names


def build(name: str, weights: Weights) -> Layer:
    """A peer around weights; raises whatever it raises."""
    layer: Layer = import_module(f"{__name__}.{PEERS[name].module}").build(weights)
    return layer


def need_cuda(weights: Weights) -> None:
    """For peers that only have CUDA kernels.

    Raises:
        Unavailable: the weights are on a CPU.
    """
    if not weights.gate_up_EGD.is_cuda:
        raise Unavailable("it runs on CUDA only")
