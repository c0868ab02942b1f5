"""The one way in which `compress_peers.py` scores what any tool made: plain expert matrices in the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def score(place: Path, plain: Path | None) -> dict[str, Any]:
    """Nats of each held-out document, in fp32, and how far expert weights are from the model's.

    Args:
        place: of the model and its held-out text.
        plain: matrices to put in the place of all its experts'; None leaves them.
    """
    import torch
    from safetensors.torch import load_file

    from moectl.checkpoint.source import Checkpoint
    from moectl.data.tokens import BYTE_EOS_ID
    from moectl.layerwise.scoring import log_probabilities
    from moectl.layerwise.whole import load

    model = load(Checkpoint.open(str(place / "model")))
    wrong = whole = 0.0
    if plain is not None:
        matrices = load_file(plain)
        with torch.no_grad():
            for layer, block in enumerate(model.model.layers):
                experts = block.mlp.experts
                for expert in range(len(experts.gate_up_proj)):
                    gate, up, down = (
                        matrices.pop(f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight").float()
                        for kind in ("gate", "up", "down")
                    )
                    targets = (experts.gate_up_proj[expert], experts.down_proj[expert])
                    for target, made in zip(targets, (torch.cat([gate, up]), down), strict=True):
                        wrong += (target - made).square().sum().item()
                        whole += target.square().sum().item()
                        target.copy_(made)
        assert not matrices, sorted(matrices)[:3]
    documents = {name: ids.tolist() for name, ids in np.load(place / "heldout.npz").items()}
    nats = [-float(each.sum()) for each in log_probabilities(model, list(documents.values()), BYTE_EOS_ID, 256)]
    return {
        "nats": dict(zip(documents, nats, strict=True)),
        "tokens": {name: len(ids) for name, ids in documents.items()},
        "weight_error": (wrong / whole) ** 0.5 if whole else 0.0,
    }
