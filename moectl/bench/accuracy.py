"""The error of a peer against float64 on the first tokens of a batch, forward and every gradient, one expert at a time.

Tokens are independent of each other in the forward pass. In the backward pass the gradient of the output is zero but
for the tokens that are checked, so the gradients of the weights are theirs alone; the peer works on the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels import reference
from moectl.bench.inputs import Batch, Weights
from moectl.bench.peers import Layer, Unavailable

TOKENS = 256
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest allowed |error| over the largest |value|, by dtype; the root mean squares may differ by a third of it."""


@dataclass
class Difference:
    """How far numbers are from what they should be, gathered piece by piece."""

    largest: float = 0.0
    scale: float = 0.0
    squares: float = 0.0
    expected_squares: float = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Compare two tensors; a NaN or an infinity is an infinite error."""
        error = actual.double() - expected
        if error.numel():
            largest = float(error.abs().max())
            self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)
            self.scale = max(self.scale, float(expected.abs().max()))
            self.squares += float(error.square().sum()) if math.isfinite(largest) else math.inf
            self.expected_squares += float(expected.square().sum())

    @property
    def relative(self) -> float:
        """Largest error over the largest expected value."""
        return self.largest / max(self.scale, 1e-300)

    @property
    def rms(self) -> float:
        """Root mean square of the error over that of the expected values."""
        return math.sqrt(self.squares / max(self.expected_squares, 1e-300))


@dataclass(frozen=True)
class Errors:
    """Worst of all compared tensors: max relative, RMS relative, and whether both are within the tolerance."""

    relative: float
    rms: float
    good: bool


def check(layer: Layer, weights: Weights, batch: Batch, what: str) -> Errors:
    """Run the layer once, untimed, and compare: the output, and the gradients where `what` has a backward pass.

    Raises:
        Unavailable: the peer gives no gradient to something.
    """
    checked = min(TOKENS, len(batch.x_TD))
    if what in ("bwd", "train"):
        found = _gradients(layer, weights, batch, checked)
    else:
        with torch.no_grad():
            out_TD = layer.call(batch.x_TD, batch.index_TK, batch.weight_TK)
        found = [_forward(out_TD, weights, batch, checked)]
    relative, rms = max(one.relative for one in found), max(one.rms for one in found)
    tolerance = TOLERANCE[str(batch.x_TD.dtype).removeprefix("torch.")]
    return Errors(relative, rms, relative <= tolerance and rms <= tolerance / 3)


def _forward(out_TD: Tensor, weights: Weights, batch: Batch, checked: int) -> Difference:
    x_TD, weight_TK = batch.x_TD[:checked].detach().double(), batch.weight_TK[:checked].detach().double()
    expected_TD = torch.zeros_like(x_TD)
    for expert in batch.index_TK[:checked].unique().tolist():
        gate_up, down = (w[expert : expert + 1].detach().double() for w in (weights.gate_up_EGD, weights.down_EDF))
        expected_TD += reference.expert_mlp(x_TD, gate_up, down, _only(expert, batch, checked), weight_TK)
    difference = Difference()
    difference.add(out_TD[:checked].detach(), expected_TD)
    return difference


def _gradients(layer: Layer, weights: Weights, batch: Batch, checked: int) -> list[Difference]:
    dy_TD = batch.dy_TD.clone()
    dy_TD[checked:] = 0
    out_TD = layer.call(batch.x_TD, batch.index_TK, batch.weight_TK)
    wanted = (batch.x_TD, batch.weight_TK, *layer.parameters)
    dx_TD, dweight_TK, *dparameters = torch.autograd.grad(out_TD, wanted, dy_TD, allow_unused=True)
    if dx_TD is None or dweight_TK is None or any(gradient is None for gradient in dparameters):
        raise Unavailable("it gives no gradient to the tokens, the routing weights or its parameters")
    dgate_up_EGD, ddown_EDF = layer.canonical(*dparameters)
    x_TD, weight_TK = (t[:checked].detach().double().requires_grad_() for t in (batch.x_TD, batch.weight_TK))
    expected_dx, expected_dweight = torch.zeros_like(x_TD), torch.zeros_like(weight_TK)
    differences = [_forward(out_TD, weights, batch, checked), *(Difference() for _ in range(4))]
    used = set(batch.index_TK[:checked].unique().tolist())
    for expert in range(weights.shape.num_experts):
        dgate_up, ddown = dgate_up_EGD[expert : expert + 1], ddown_EDF[expert : expert + 1]
        if expert not in used:
            differences[1].add(dgate_up, torch.zeros_like(dgate_up, dtype=torch.float64))
            differences[2].add(ddown, torch.zeros_like(ddown, dtype=torch.float64))
            continue
        gate_up, down = (
            w[expert : expert + 1].detach().double().requires_grad_() for w in (weights.gate_up_EGD, weights.down_EDF)
        )
        y_TD = reference.expert_mlp(x_TD, gate_up, down, _only(expert, batch, checked), weight_TK)
        ours = torch.autograd.grad(y_TD, (gate_up, down, x_TD, weight_TK), dy_TD[:checked].double())
        differences[1].add(dgate_up, ours[0])
        differences[2].add(ddown, ours[1])
        expected_dx += ours[2]
        expected_dweight += ours[3]
    differences[3].add(dx_TD[:checked], expected_dx)
    differences[4].add(dweight_TK[:checked], expected_dweight)
    return differences


def _only(expert: int, batch: Batch, checked: int) -> Tensor:
    """The routing with one expert, called 0; all others are 1, which a layer of one expert does not have."""
    return (batch.index_TK[:checked] != expert).long()
