"""`moectl compress qmoe` as a workflow: from what was asked for to layer files, and from these to a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.plan import Plan
from moectl.checkpoint.provenance import read_provenance
from moectl.checkpoint.source import Checkpoint
from moectl.codecs.checks import VERSION
from moectl.compress.calibration import Calibration, calibration_tokens
from moectl.compress.dense import DensePart
from moectl.compress.export import foreseen
from moectl.compress.pipeline.preflight import Estimate, estimate, require
from moectl.compress.pipeline.report import LayerReport
from moectl.compress.pipeline.run import folder_of, run
from moectl.compress.pipeline.settings import Settings
from moectl.compress.pipeline.stacks import candidates
from moectl.compress.qmoe import coded, exported, plan_qmoe
from moectl.compress.qmoe_recipe import QmoeRecipe
from moectl.compress.quantise.method import Method
from moectl.errors import InputError
from moectl.integrations.complete import is_routed
from moectl.layerwise.pairs import Ids, model_inputs, parts
from moectl.layerwise.skeleton import all_layers, build, read_config
from moectl.layerwise.whole import check_ids, device_named, dtype_named
from moectl.text import escape

_DENSE_BITS = {"int8": 8, "int4": 4}
_BY_NAME = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Job:
    """One compression, ready to start.

    Attributes:
        tokens: token ids to calibrate on.
    """

    source: Checkpoint
    recipe: QmoeRecipe
    calibration: Calibration
    tokens: Ids
    method: Method
    settings: Settings

    @classmethod
    def of(cls, source: Checkpoint, recipe: QmoeRecipe, calibration: Calibration) -> Job:
        """Read the text and look at the model; no weights are read.

        Raises:
            UsageError: an option does not fit the model.
            InputError: the model has no experts that can be coded, or model and data do not belong together.
            MachineError: there is no such device, or the Hub cannot be reached.
        """
        if is_routed(source):
            raise InputError(
                f"{escape(source.name)} is a research checkpoint, with a router of moectl's own.",
                "A compressed checkpoint has the class of an ordinary one, and no such class has that router.",
                "Give the checkpoint it was made from.",
            )
        model = build(source, torch.float32, "meta", two_stacks=True)
        found = [name for layer in all_layers(source, model)[0].items() for name in candidates(*layer)]
        if not found:
            raise InputError(
                f"{escape(source.name)} has no routed experts.",
                "Experts are what is coded.",
                "Give a Mixture-of-Experts model (`moectl inspect` shows what a model is).",
            )
        if recipe.export:
            foreseen(recipe.export, model, [name for name in found if not name.endswith("bias")], recipe.group_size)
        device = device_named(calibration.device)
        dtype = dtype_named(calibration.dtype, device)
        if dtype == "auto":
            dtype = getattr(read_config(source), "dtype", None) or torch.float32
        stored = weights_dtype(source)
        method = recipe.method(stored)
        dense = None if recipe.dense == "bf16" else DensePart(_DENSE_BITS[recipe.dense], stored)
        tokens = model_inputs(source, calibration_tokens(source, calibration))
        for ids_BL in parts(tokens):
            check_ids(source, model, ids_BL)
        settings = Settings(
            dense=dense,
            batch_experts=recipe.batch_experts,
            min_tokens=recipe.min_tokens,
            all_experts=recipe.all_experts,
            gate_weighted=recipe.gate_weighted,
            dtype=dtype,
            device=device,
        )
        return cls(source, recipe, calibration, tokens, method, settings)

    @property
    def sequences(self) -> int:
        """How many are calibrated on."""
        return len(parts(self.tokens)[0])

    @cached_property
    def key(self) -> str:
        """What tells this from any other compression."""
        return folder_of(self.source, self.tokens, self.method, self.settings, Path()).name

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """What the output says that it was made by."""
        return {
            "method": "qmoe",
            **self.recipe.to_json(),
            "quantiser": self.method.to_json(),
            "calibration": self.calibration.about(self.tokens),
            "key": self.key,
        }

    def is_recorded_in(self, out: Path) -> bool:
        """Whether `out` says that it was made of the same model, with the same options and text."""
        try:
            return bool(read_provenance(out).get("recipe") == json.loads(json.dumps(self.recorded)))
        except InputError:
            return False

    @cached_property
    def estimate(self) -> Estimate:
        """What `run` will take."""
        return estimate(self.source, self.tokens, self.method, self.settings)

    def run(self, place: Path, say: Callable[[str], None], advance: Callable[[float], None]) -> list[Path]:
        """The layer files, in a folder in `place`; those that are there are taken as they are.

        Raises:
            InputError: weights or activations are not finite, or the model cannot be run layer by layer.
            MachineError: disk or memory do not suffice.
        """
        require(self.estimate, self.settings, place / self.key)
        return run(self.source, self.tokens, self.method, self.settings, place, say, advance)

    def plan(self, paths: Sequence[Path]) -> tuple[Plan, Sequence[LayerReport]]:
        """The plan of the output, from the layer files, and what became of every expert.

        Raises:
            InputError: the family has no place in the format to export to.
        """
        made = coded(self.source, paths)
        quantization: dict[str, Any] = {
            "quant_method": "qmoe",
            "version": VERSION,
            "experts": self.method.to_json(),
            "dense": None if self.settings.dense is None else self.settings.dense.config(),
        }
        if self.recipe.export:
            made, quantization = exported(made, self.recipe.export, paths[0].parent / self.recipe.export)
        return plan_qmoe(made, self.recorded, quantization, self.recipe.shard_bytes), made.layers


def weights_dtype(source: Checkpoint) -> torch.dtype:
    """The floating-point type that most of a checkpoint's weights have; of float64, which no level has, float32.

    Raises:
        InputError: it has none.
    """
    sizes: dict[str, int] = {}
    for ref in source.tensors.values():
        if ref.dtype in FLOATS:
            sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    if not sizes:
        raise InputError(
            f"{escape(source.name)} has no floating-point weights.",
            "What is quantised already is not quantised again.",
            "Give the checkpoint it was made from.",
        )
    found: torch.dtype = getattr(torch, _BY_NAME[max(sizes, key=lambda name: sizes[name])])
    return torch.float32 if found == torch.float64 else found
