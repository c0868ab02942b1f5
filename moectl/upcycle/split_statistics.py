"""How often each neuron of a dense model's FFNs is active on text, measured one layer at a time.

Legend: B sequences, L tokens each, F intermediate size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moectl.checkpoint.kept import identity, kept
from moectl.checkpoint.source import Checkpoint
from moectl.families.registry import DENSE
from moectl.layerwise.model import LayerCall, LayerwiseModel

ACTIVE_SHARE = 0.1
"""A neuron is active on a token when its activation is among this share of the token's largest in magnitude.

CMoE (arXiv 2502.04416) also marks a fixed number per token: SwiGLU activations are hardly ever zero, as ReLU's are.
"""


@dataclass(frozen=True)
class ActivationRates:
    """Shares of tokens on which neurons are active, [F] in [0, 1] for each layer, and what they were measured on."""

    rates: Mapping[int, np.ndarray]
    tokens: int
    data: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What goes into a recipe, and so into a plan's fingerprint: where they come from and their hash."""
        digest = hashlib.sha256()
        for layer, rate_F in sorted(self.rates.items()):
            digest.update(f"{layer}:".encode() + rate_F.astype("<f8").tobytes())
        return {"tokens": self.tokens, "data": list(self.data), "sha256": digest.hexdigest()}


def activation_rates(
    source: Checkpoint, token_BL: np.ndarray, data: Sequence[str], directory: Path | None = None
) -> ActivationRates:
    """Run a dense model over token ids [B, L] and count where `act(gate(x)) * up(x)` is large.

    Args:
        directory: where they are kept, as layers.{layer}.active [F], float64, and taken from if they are there.

    Raises:
        InputError: the model cannot be run one layer at a time.
    """
    if directory is None:
        return ActivationRates(_measured(source, token_BL), token_BL.size, tuple(data))
    tokens = hashlib.sha256(token_BL.astype("<i8").tobytes()).hexdigest()
    decides = {**identity(source), "tokens": [list(token_BL.shape), tokens], "share": ACTIVE_SHARE}
    file = kept(
        directory, "activations", decides, lambda: {_name(x): y for x, y in _measured(source, token_BL).items()}
    )
    rates = {layer: file.read(_name(layer)) for layer in range(len(file.tensors))}
    return ActivationRates(rates, token_BL.size, tuple(data))


def _name(layer: int) -> str:
    return f"layers.{layer}.active"


def _measured(source: Checkpoint, token_BL: np.ndarray) -> dict[int, np.ndarray]:
    down = DENSE[source.model_type].mlp.down
    name = down.partition("{layer}.")[2].removesuffix(".weight")
    rates: dict[int, np.ndarray] = {}

    def count(call: LayerCall) -> Tensor:
        def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rates[call.index] = _rates(arguments[0].flatten(0, -2))

        hook = call.module.get_submodule(name).register_forward_pre_hook(see)
        try:
            return call.run()
        finally:
            hook.remove()

    LayerwiseModel.open(source).run(torch.from_numpy(token_BL), count)
    return rates


def _rates(activation_TF: Tensor) -> np.ndarray:
    largest = max(1, round(ACTIVE_SHARE * activation_TF.shape[1]))
    index_TA = activation_TF.abs().topk(largest, dim=1).indices
    counts = torch.bincount(index_TA.flatten(), minlength=activation_TF.shape[1])
    return counts.double().numpy() / len(activation_TF)
