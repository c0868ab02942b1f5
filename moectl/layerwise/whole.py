"""A whole checkpoint in memory: how commands load it, and where and in which type they compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MachineError, UsageError
from moectl.integrations.complete import from_pretrained
from moectl.layerwise.skeleton import read_config, unusable
from moectl.text import escape, shown


def load(checkpoint: Checkpoint, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The model in fp32, or `dtype` (auto is its own), as `from_pretrained` loads it; every key must find its place.

    Raises:
        InputError: transformers cannot load it, or a key is missing, unexpected or of another shape.
    """
    auto = AutoModelForSeq2SeqLM if read_config(checkpoint).is_encoder_decoder else AutoModelForCausalLM
    try:
        return from_pretrained(auto, checkpoint, dtype=dtype)
    except InputError:  # a ValueError too
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise unusable(checkpoint, "cannot be loaded by transformers", error) from error


def check_ids(checkpoint: Checkpoint, model: PreTrainedModel, documents: Iterable[Iterable[int]]) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        InputError: there is one.
    """
    largest = max((max(ids, default=0) for ids in documents), default=0)
    vocabulary = model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise InputError(
            f"{escape(checkpoint.name)}: its tokenizer gives id {largest}, and its vocabulary has {vocabulary}.",
            "The tokenizer is not the model's.",
            "Put the right tokenizer files beside the weights.",
        )


def device_named(name: str) -> torch.device:
    """What `--device` names.

    Raises:
        UsageError: it is neither auto, cpu nor cuda.
        MachineError: there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {shown(name)!r} is not known.", "", "Give auto, cpu or cuda.")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise MachineError("--device cuda: torch sees no CUDA device.", "", "Use --device cpu, or another machine.")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def dtype_named(name: str, device: torch.device) -> Any:
    """What `--dtype` names, for `load`: with auto float32 on a CPU, else the checkpoint's own.

    Raises:
        UsageError: it is none of auto, float32, bfloat16 and float16.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in TORCH_NAMES:
        raise UsageError(f"--dtype {shown(name)!r} is not known.", "", "Give auto, float32, bfloat16 or float16.")
    return getattr(torch, name)
