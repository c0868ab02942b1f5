"""Tiny models on disk for the pipeline, and quantisers so simple that what they should give is plain."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from installed import installed
from torch import Tensor

from moectl.checkpoint.source import Checkpoint
from moectl.compress.quantise.piece import to_numpy
from moectl.families.backend import experts_classes
from moectl.families.tiny_moe import model_types, tiny_moe
from moectl.layerwise.quiet import quiet

NO_LANGUAGE_MODEL = {
    *("deepseek_ocr2_text", "diffusion_gemma_text", "ernie4_5_vl_moe_text", "glm4v_moe_text", "glm5_next_text"),
    *("mistral4", "mistral_large4_text", "muse_spark_text", "openai_privacy_filter", "qwen3_omni_moe_text"),
    *("qwen3_omni_moe_talker_text", "qwen3_vl_moe_text", "step3p5", "unlimited_ocr_text", "vitpose_backbone"),
}
"""Parts of larger models, and models that predict no tokens."""
TWO_STACKS = installed("nllb-moe", "switch_transformers")
FAMILIES = installed(
    *sorted(
        {each for family in experts_classes() if family != "vitpose_backbone" for each in model_types(family)}
        - NO_LANGUAGE_MODEL
        - {"nllb-moe", "switch_transformers"}
    )
)
"""Every decoder MoE family of the installed transformers that predicts tokens."""


def saved(path: Path, model_type: str, **sizes: Any) -> tuple[Checkpoint, Any]:
    """A tiny random model of a family on disk and in memory, its experts in their eager implementation."""
    with quiet():
        model = tiny_moe(model_type, **sizes)
        model.save_pretrained(path)
        model.set_experts_implementation("eager")
    return Checkpoint.open(path), model


def token_ids(sequences: int = 4, length: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 96, (sequences, length))


def facts(weight_GRN: Tensor) -> dict[str, Tensor]:
    """What reports want of a piece."""
    zeros = torch.zeros(len(weight_GRN))
    return {"error_G": zeros, "zeros_G": zeros, "bits_G": zeros + 16, "factor_G": zeros + 1, "fallback_G": zeros > 0}


@dataclass
class Exact:
    """Stores matrices as they are, and keeps what it was given."""

    given: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)

    def quantise(self, weight_GRN: Tensor, hessian_GNN: Tensor | None, counted_G: Tensor | None) -> dict[str, Tensor]:
        assert counted_G is not None
        self.given.append((weight_GRN.clone(), None if hessian_GNN is None else hessian_GNN.clone(), counted_G.clone()))
        return {"weight_GRN": weight_GRN, **facts(weight_GRN)}

    def dense(self, piece: dict[str, Tensor]) -> Tensor:
        return piece["weight_GRN"]

    def store(self, name: str, piece: dict[str, Tensor], *, transposed: bool, stacked: bool) -> dict[str, np.ndarray]:
        weight = piece["weight_GRN"].mT if transposed else piece["weight_GRN"]
        return {f"{name}.plain": to_numpy(weight if stacked else weight[0])}

    def to_json(self) -> dict[str, Any]:
        return {"method": "exact"}


class Rounded(Exact):
    """Rounds to multiples of a sixteenth, the more so the more a column was used: a small GPTQ stand-in."""

    def quantise(self, weight_GRN: Tensor, hessian_GNN: Tensor | None, counted_G: Tensor | None) -> dict[str, Tensor]:
        rounded = (weight_GRN * 16).round() / 16
        if hessian_GNN is not None:
            rounded += hessian_GNN.diagonal(dim1=1, dim2=2)[:, None] * 2.0**-16
        return {"weight_GRN": rounded, **facts(weight_GRN)}
