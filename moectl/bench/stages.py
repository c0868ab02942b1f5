"""Where the time of our own layer goes: its stages one by one. A stage is one function here and one line in STAGES.

A stage is given weights and a batch and returns the call to time; what it needs from earlier stages is made outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels import SWIGLU, dispatch, expert_mlp, route, target, tuning
from moectl.bench import roofline
from moectl.bench.inputs import Batch, Weights
from moectl.bench.roofline import Work

Call = Callable[[], Any]


@dataclass(frozen=True)
class Stage:
    """One step of the layer.

    Attributes:
        about: what it is.
        make: from weights and a batch to the call that is timed.
        work: FLOPs and bytes it cannot do without; None where that says nothing.
        devices: device types it exists on.
    """

    about: str
    make: Callable[[Weights, Batch], Call]
    work: Callable[[Weights, Batch], Work] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


def _router(weights: Weights, batch: Batch) -> Call:
    logits_TE = torch.randn(len(batch.x_TD), weights.shape.num_experts, device=batch.x_TD.device)
    return lambda: route(logits_TE, weights.shape.top_k, renormalise=True)


def _plan(weights: Weights, batch: Batch) -> Call:
    block_m = _line(weights, batch).block_m if batch.x_TD.is_cuda else 128
    return lambda: dispatch(batch.index_TK, weights.shape.num_experts, block_m)


def _layer(weights: Weights, batch: Batch) -> torch.Tensor:
    return expert_mlp(batch.x_TD, weights.gate_up_EGD, weights.down_EDF, batch.index_TK, batch.weight_TK)


def _inference(weights: Weights, batch: Batch) -> Call:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return _layer(weights, batch)

    return call


def _saving(weights: Weights, batch: Batch) -> Call:
    return lambda: _layer(weights, batch)


def _backward(weights: Weights, batch: Batch) -> Call:
    out_TD = _layer(weights, batch)
    inputs = (batch.x_TD, batch.weight_TK, weights.gate_up_EGD, weights.down_EDF)
    return lambda: torch.autograd.grad(out_TD, inputs, batch.dy_TD, retain_graph=True)


def _line(weights: Weights, batch: Batch) -> tuning.Line:
    return tuning.choose(target.of(batch.x_TD), batch.index_TK.numel(), weights.shape.num_experts)


@torch.no_grad()
def _kernel(name: str, weights: Weights, batch: Batch) -> Call:
    """One launch of the Triton pipeline, on random rows where its input is an earlier kernel's output."""
    from moe_kernels.gpu.combine import combine
    from moe_kernels.gpu.experts import activation_gradients, grouped, grouped_outer

    line = _line(weights, batch)
    plan = dispatch(batch.index_TK, weights.shape.num_experts, line.block_m)
    x_TD, dy_TD, weight_TK = batch.x_TD.detach(), batch.dy_TD, batch.weight_TK.detach()
    gate_up, down = weights.gate_up_EGD.detach(), weights.down_EDF.detach()

    def random(width: int) -> torch.Tensor:
        return torch.randn(batch.index_TK.numel(), width, device=x_TD.device).to(x_TD.dtype)

    match name:
        case "up":
            return lambda: grouped(x_TD, gate_up, plan, line["up"], gather=True, activation=SWIGLU)
        case "up, kept":
            return lambda: grouped(x_TD, gate_up, plan, line["up"], gather=True, activation=SWIGLU, save=True)
        case "down":
            a_SF = random(down.shape[2])
            return lambda: grouped(a_SF, down, plan, line["down"])
        case "combine":
            y_SD, out_TD = random(x_TD.shape[1]), torch.empty_like(x_TD)
            return lambda: combine(y_SD, plan, weight_TK, out_TD)
        case "dact":
            h_SG = random(gate_up.shape[1])
            return lambda: activation_gradients(dy_TD, h_SG, down, weight_TK, plan, line["dact"], SWIGLU)
        case "ddown":
            a_SF = random(down.shape[2])
            return lambda: grouped_outer(dy_TD, a_SF, plan, line["dw"], down, None, gather="a", weight_TK=weight_TK)
        case "dx":
            dh_SG = random(gate_up.shape[1])
            return lambda: grouped(dh_SG, gate_up.mT, plan, line["dx"])
        case "dx, combined":
            rows_SD, dx_TD = random(x_TD.shape[1]), torch.empty_like(x_TD)
            return lambda: combine(rows_SD, plan, None, dx_TD)
        case "dgate_up":
            dh_SG = random(gate_up.shape[1])
            return lambda: grouped_outer(dh_SG, x_TD, plan, line["dw"], gate_up, None, gather="b")
    raise AssertionError(name)


def _triton(name: str, about: str, kernel: str = "", what: str = "train") -> Stage:
    """A stage that is one Triton kernel; `kernel` is what `roofline.kernels` calls it."""

    def work(weights: Weights, batch: Batch) -> Work:
        return roofline.kernels(what, *_sizes(weights, batch))[kernel or name]

    return Stage(about, lambda weights, batch: _kernel(name, weights, batch), work, ("cuda",))


def _pass(what: str) -> Callable[[Weights, Batch], Work]:
    def work(weights: Weights, batch: Batch) -> Work:
        (only,) = roofline.ideal(what, *_sizes(weights, batch))
        return only

    return work


def _sizes(weights: Weights, batch: Batch) -> tuple[Any, ...]:
    return weights.shape, len(batch.x_TD), batch.rows, batch.active, weights.gate_up_EGD.itemsize


STAGES = {
    "router": Stage("scores, choice and weights from logits", _router),
    "dispatch": Stage("rows grouped by expert", _plan),
    "up": _triton("up", "gather, up-projection, activation", what="fwd"),
    "up, kept": _triton("up, kept", "the same, the up-projection kept for backward", "up"),
    "down": _triton("down", "down-projection"),
    "combine": _triton("combine", "weighted sum of each token's rows"),
    "forward": Stage("the whole layer, nothing kept", _inference, _pass("fwd")),
    "forward, kept": Stage("the whole layer, the up-projection kept for backward", _saving, _pass("fwd")),
    "dact": _triton("dact", "gradients of the up-projection and the routing weights"),
    "ddown": _triton("ddown", "gradient of the down-projection"),
    "dx": _triton("dx", "gradients of the rows"),
    "dx, combined": _triton("dx, combined", "sum of each token's gradients", "reduce"),
    "dgate_up": _triton("dgate_up", "gradient of the up-projection"),
    "backward": Stage("gradients to tokens, both weights and routing weights", _backward, _pass("bwd")),
}
"""In the order in which they run."""
