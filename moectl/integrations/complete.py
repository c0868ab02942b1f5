"""A model from a checkpoint by transformers, with every weight: what is missing it would make up, and only warn."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families.components import ROUTED
from moectl.families.releases import refuse_older
from moectl.integrations.implementation import set_ours
from moectl.text import escape

CODED = "qmoe"
"""The `quant_method` of checkpoints whose experts are coded."""


def is_coded(checkpoint: Checkpoint) -> bool:
    """Whether the experts of a checkpoint are coded."""
    stated = checkpoint.config.get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == CODED


def is_routed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a research checkpoint, with a router of ours."""
    return checkpoint.config.get("model_type") == ROUTED


def make_known(checkpoint: Checkpoint) -> None:
    """Have transformers know what only this package can load, if the checkpoint is such a one.

    Raises:
        InputError: the installed transformers is too old for its family.
    """
    refuse_older(checkpoint.config)
    if is_coded(checkpoint) or is_routed(checkpoint):
        import moectl.integrations.transformers  # noqa: F401 - transformers knows what is ours by registration


def from_pretrained(auto: Any, checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint, coded or not, by one of transformers' classes and with options of theirs.

    Coded experts run on our kernels, which need not decode them, where their family lets that be chosen and no
    `experts_implementation` is given.

    Raises:
        InputError: a key is missing, unexpected or of another shape, or a coded weight is damaged.
        Exception: whatever transformers raises.
    """
    make_known(checkpoint)
    fixed = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    # Misfits would be an error of transformers' own; ignored, they come listed, to be refused with the others.
    model, info = auto.from_pretrained(
        checkpoint.path, output_loading_info=True, ignore_mismatched_sizes=True, **fixed, **options
    )
    check_complete(checkpoint, info)
    if is_coded(checkpoint) and "experts_implementation" not in options:
        set_ours(model)
    return model


def check_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model that would have random weights, or leaves weights of the checkpoint out.

    Args:
        info: transformers' `output_loading_info`.

    Raises:
        InputError: a key is missing, unexpected or of another shape.
    """
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(f"{kind}_keys") or ())
        if keys:
            shown = ", ".join(repr(escape(key)) for key in keys[:5])
            problems.append(f"{kind} {shown}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
    if problems:
        raise InputError(
            f"{escape(checkpoint.name)} does not load completely: {'; '.join(problems)}.",
            "Missing or mismatched weights would be random and unexpected ones ignored: another function.",
            "Compare its tensors with its config.json (`moectl inspect`), or download or write it again.",
        )
