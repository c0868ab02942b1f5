"""Coded checkpoints made by hand: random ternary experts in tiny random models, written without moectl's own writer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moectl.codecs import blob
from moectl.compress.pipeline.stacks import candidates
from moectl.families.tiny_moe import EXPERTS
from moectl.layerwise.quiet import quiet


def expert_matrices(model: nn.Module) -> list[str]:
    """The parameters that hold matrices of routed experts: stacks of them, single ones, or rows of all (DBRX)."""
    found = candidates("model", model).items()
    return [name.removeprefix("model.") for name, parameter in found if parameter.ndim == 3 or "bias" not in name]


def write_coded(model: Any, place: Path, *, flip: bool = False, seed: int = 0) -> Path:
    """Make the experts of a model random ternary, and write it: coded to `place`/coded, and plainly to `place`/plain.

    What is not coded has the names that `save_pretrained` gives it.

    Args:
        flip: have every other matrix coded the other way round than its family has it: readers must not care.
    """
    draw = np.random.default_rng(seed)
    coded: dict[str, torch.Tensor] = {}
    for number, name in enumerate(expert_matrices(model)):
        owner, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        transposed = getattr(owner, "is_transposed", False) != (flip and number % 2 == 1)
        matrices = parameter.data
        if parameter.ndim == 2 and not isinstance(owner, nn.Linear):
            matrices = matrices.view(EXPERTS, -1, matrices.shape[1])
        packed = random_blob(name, tuple((matrices.mT if transposed else matrices).shape), draw, transposed=transposed)
        value = torch.from_numpy(packed.weights())
        parameter.data = (value.mT.contiguous() if transposed else value).view(parameter.shape)
        coded |= {each: torch.from_numpy(array) for each, array in packed.tensors().items()}
    with quiet():
        model.save_pretrained(place / "plain")
        without = {name: tensor for name, tensor in model.state_dict().items() if f"{name}.about" not in coded}
        model.save_pretrained(place / "coded", state_dict=without)
    add(place / "coded", coded)
    config = json.loads((place / "coded" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qmoe", "version": 1}
    (place / "coded" / "config.json").write_text(json.dumps(config))
    return place / "coded"


def random_blob(name: str, shape: tuple[int, ...], draw: np.random.Generator, *, transposed: bool) -> blob.Blob:
    """A matrix or a stack of some shape, 70 % zeros."""
    trits = draw.choice(np.array([-1, 0, 1], np.int8), shape, p=[0.15, 0.7, 0.15])
    levels = (np.array([-1, 1]) * draw.uniform(0.2, 0.6, (*shape[:-1], 2))).astype(np.float32)
    return blob.pack(trits, levels, name, transposed=transposed)


def add(directory: Path, tensors: dict[str, torch.Tensor], without: Iterable[str] = ()) -> None:
    """Put tensors into the only weight file of a checkpoint, in place of others of their names, and take some away."""
    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in without}
    save_file({**kept, **tensors}, file, {"format": "pt"})


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints of one file have the same tensors, bit for bit."""
    first, second = (load_file(each / "model.safetensors") for each in (one, other))
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(raw(tensor), raw(second[name]))
        for name, tensor in first.items()
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, which are compared where numbers cannot be."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)
