"""On which tokens of a text each neuron of a dense model's FFNs is active, measured one layer at a time.

Legend: B sequences, L tokens each, T tokens in all, P of them, F intermediate size, A active neurons.
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


PATTERN_TOKENS = 2048
"""On how many tokens, spread evenly over the text, it is kept which neurons are active."""


@dataclass(frozen=True)
class Activations:
    """When neurons are active, layer by layer, and what that was measured on.

    Attributes:
        rates: the share of all tokens on which a neuron is active [F], in [0, 1].
        patterns: on which of PATTERN_TOKENS tokens it is [F, P], packed bits, uint8.
    """

    rates: Mapping[int, np.ndarray]
    patterns: Mapping[int, np.ndarray]
    tokens: int
    data: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What goes into a recipe, and so into a plan's fingerprint: where they come from and their hash."""
        digest = hashlib.sha256()
        for layer, rate_F in sorted(self.rates.items()):
            digest.update(f"{layer}:".encode() + rate_F.astype("<f8").tobytes() + self.patterns[layer].tobytes())
        return {"tokens": self.tokens, "data": list(self.data), "sha256": digest.hexdigest()}


def activations(
    source: Checkpoint, token_BL: np.ndarray, data: Sequence[str], directory: Path | None = None
) -> Activations:
    """Run a dense model over token ids [B, L] and see where `act(gate(x)) * up(x)` is large.

    Args:
        directory: where they are kept, as layers.{layer}.rate [F], float64, and layers.{layer}.pattern [F, P / 8],
            uint8, and taken from if they are there.

    Raises:
        InputError: the model cannot be run one layer at a time.
    """
    if directory is None:
        found = _measured(source, token_BL)
    else:
        tokens = hashlib.sha256(token_BL.astype("<i8").tobytes()).hexdigest()
        decides = {**identity(source), "tokens": [list(token_BL.shape), tokens], "kept": [ACTIVE_SHARE, PATTERN_TOKENS]}
        file = kept(directory, "activations", decides, lambda: _measured(source, token_BL))
        found = {name: file.read(name) for name in file.tensors}
    rates, patterns = (
        {layer: found[f"layers.{layer}.{what}"] for layer in range(len(found) // 2)} for what in ("rate", "pattern")
    )
    return Activations(rates, patterns, token_BL.size, tuple(data))


def pattern(packed_FP: np.ndarray) -> np.ndarray:
    """Whether each neuron is active on each token, 1 or 0, float32 [F, P]."""
    return np.unpackbits(packed_FP, axis=1).astype(np.float32)


def _measured(source: Checkpoint, token_BL: np.ndarray) -> dict[str, np.ndarray]:
    down = DENSE[source.model_type].mlp.down
    name = down.partition("{layer}.")[2].removesuffix(".weight")
    found: dict[str, np.ndarray] = {}

    def look(call: LayerCall) -> Tensor:
        def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            active_TA = _active(arguments[0].flatten(0, -2))
            found[f"layers.{call.index}.rate"], found[f"layers.{call.index}.pattern"] = _counted(
                active_TA, arguments[0].shape[-1]
            )

        hook = call.module.get_submodule(name).register_forward_pre_hook(see)
        try:
            return call.run()
        finally:
            hook.remove()

    LayerwiseModel.open(source).run(torch.from_numpy(token_BL), look)
    return found


def _active(activation_TF: Tensor) -> Tensor:
    """The neurons that are active on each token [T, A]."""
    largest = max(1, round(ACTIVE_SHARE * activation_TF.shape[1]))
    return activation_TF.abs().topk(largest, dim=1).indices


def _counted(active_TA: Tensor, neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """The rate of each neuron [F], and its pattern on some of the tokens [F, P / 8], packed."""
    counts = torch.bincount(active_TA.flatten(), minlength=neurons)
    tokens = len(active_TA)
    some_PA = active_TA[torch.linspace(0, tokens - 1, min(tokens, PATTERN_TOKENS)).long()]
    pattern_PF = torch.zeros(len(some_PA), neurons, dtype=torch.bool).scatter_(1, some_PA.cpu(), True)
    return counts.double().numpy() / tokens, np.packbits(pattern_PF.numpy().T, axis=1)
