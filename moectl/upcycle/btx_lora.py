"""LoRA adapters of PEFT (arXiv 2106.09685) as deltas in a plan: W + s B A, added while the tensor is streamed.

An adapter directory holds adapter_config.json and adapter_model.safetensors. What changes the meaning of its matrices
(DoRA, biases, ranks by pattern, initialisations that alter the base) is refused by its field's name, and so is a field
that is not known to be harmless.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.checkpoint.expressions import AddLowRank, Copy, Expression, Shape
from moectl.checkpoint.location import resolve
from moectl.checkpoint.source import Checkpoint, read_json
from moectl.errors import InputError
from moectl.text import escape, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
_HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "runtime_config",
    "ensure_weight_tying",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` of which the base model stays what it was."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its weights as a source of a plan, and what its deltas are multiplied by.

    Attributes:
        name: of its directory or repository.
        targets: the weight each pair of matrices is added to -> (name of A [r, in], name of B [out, r]).
    """

    name: str
    weights: Checkpoint
    scale: float
    targets: Mapping[str, tuple[str, str]]

    def added(
        self, tensors: Mapping[str, Expression], shapes: Mapping[str, Shape], place: int
    ) -> dict[str, Expression]:
        """The model's weights with the deltas added; `place` is the adapter's among the plan's sources.

        Raises:
            InputError: a delta has no weight of its shape in the model.
        """
        result = dict(tensors)
        for target, (a, b) in self.targets.items():
            delta = (self.weights.tensors[b].shape[0], self.weights.tensors[a].shape[1])
            if shapes.get(target) != delta:
                held = f"has it as {list(shapes[target])}" if target in shapes else "has no such weight"
                raise _bad(self.name, f"changes {shown(target)!r} {list(delta)}, but its base model {held}")
            result[target] = AddLowRank(tensors[target], Copy(b, place), Copy(a, place), self.scale)
        return result


def open_adapter(name: str) -> Adapter:
    """The adapter in a directory or Hub repository.

    Raises:
        InputError: it is not there, is no LoRA adapter, or says what cannot be merged as W + s B A.
        MachineError: the Hub cannot be reached.
    """
    location = resolve(name)
    config = read_json(location.path / CONFIG)
    _check(location.name, config)
    if not (location.path / WEIGHTS).exists():
        raise _bad(
            location.name, f"has no {WEIGHTS}", "Save it with `safe_serialization=True`; pickles are not opened."
        )
    weights = Checkpoint.of_file(location.path / WEIGHTS)
    targets = _targets(location.name, weights)
    return Adapter(location.name, weights, _scale(location.name, config, weights, targets), targets)


def _check(name: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _bad(
            name, f"has peft_type {shown(config.get('peft_type'))!r}, expected LORA", "Merge it with PEFT first."
        )
    for field, value in config.items():
        if field in _HARMLESS or field in _HONOURED or not value:
            continue
        raise _bad(
            name, f"has {shown(field, 60)} = {shown(value, 60)}, which is not honoured", "Merge it with PEFT first."
        )
    if config.get("bias", "none") != "none":
        raise _bad(name, f"has bias = {shown(config['bias'])!r}, which is not honoured", "Merge it with PEFT first.")
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise _bad(
            name,
            f"has init_lora_weights = {shown(start)!r}, which changed the base model too",
            "Convert it when saving (path_initial_model_for_weight_conversion), or merge it with PEFT first.",
        )


def _targets(name: str, weights: Checkpoint) -> dict[str, tuple[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    for tensor, ref in weights.tensors.items():
        match = _NAME.fullmatch(tensor)
        if match is None or len(ref.shape) != 2:
            raise _bad(
                name,
                f"holds {shown(tensor)!r} {list(ref.shape)}, which is no LoRA matrix of a linear layer",
                "Merge it with PEFT first (modules_to_save, embeddings and convolutions are not merged here).",
            )
        pairs.setdefault(f"{match['module']}.weight", {})[match["part"]] = tensor
    for target, parts in pairs.items():
        if len(parts) != 2 or weights.tensors[parts["A"]].shape[0] != weights.tensors[parts["B"]].shape[1]:
            raise _bad(name, f"has no matching A and B for {shown(target)!r}")
    if not pairs:
        raise _bad(name, "holds no tensors")
    return {target: (parts["A"], parts["B"]) for target, parts in pairs.items()}


def _scale(name: str, config: Mapping[str, Any], weights: Checkpoint, targets: Mapping[str, tuple[str, str]]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    found = {weights.tensors[a].shape[0] for a, _ in targets.values()}
    if type(rank) is not int or found != {rank}:
        raise _bad(name, f"has r = {shown(rank)}, but matrices of rank {', '.join(map(str, sorted(found)))}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise _bad(name, f"has lora_alpha = {shown(alpha)}, expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def split_name(model: str) -> tuple[str, str | None]:
    """`base+adapter` as the two names; a directory whose own name has a plus stays whole."""
    base, plus, adapter = model.rpartition("+")
    if not plus or not base or not adapter or Path(model).is_dir():
        return model, None
    return base, adapter


def _bad(name: str, what: str, fix: str = "Check that it belongs to this model, or save it again.") -> InputError:
    return InputError(f"The adapter {escape(name)} {what}.", "Its delta would not be what was trained.", fix)
