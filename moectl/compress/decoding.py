"""What a coded checkpoint becomes when it is decoded: tensors as checkpoints of its family have them, layer by layer.

transformers loads a family's checkpoints by rules for names and layouts, and saves by their inverses. Here the inverses
are applied to what one layer decodes to, or to tensors without values, to know beforehand what will come out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.hashing import examine
from moectl.checkpoint.plan import PROVENANCE
from moectl.checkpoint.provenance import read_provenance
from moectl.checkpoint.source import Checkpoint
from moectl.compress.export import Packing, export_tensors, imagined_tensors, packing
from moectl.errors import InputError
from moectl.integrations.complete import is_coded
from moectl.integrations.qmoe import stored
from moectl.integrations.qmoe.rules import native
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config, unusable
from moectl.layerwise.tensors import on_meta, read_tensor
from moectl.text import escape

OUTSIDE = "outside"
"""What stands for a layer's name where a parameter is in none."""

_LAYER = re.compile(r"^(.*?\.\d+)\.")
_LEVELS = ("levels", "scales", "weight_scale")


@dataclass(frozen=True)
class Decoding:
    """A coded checkpoint, and what there is to decode in it.

    Attributes:
        source: the checkpoint.
        model: of its config, on meta; it has the rules of its family, and knows shapes.
        coded: parameters that are stored coded, or packed in 8 or 4 bits, by name in memory.
        layers: names in memory of what is to be decoded or taken apart, by the layer it is in.
        way: how experts are packed anew, for an export; None where they are decoded.
        recorded: the hash of every tensor, where whoever wrote the checkpoint left them in its moectl.json.
    """

    source: Checkpoint
    model: PreTrainedModel
    coded: Mapping[str, stored.Parts]
    layers: Mapping[str, tuple[str, ...]]
    way: Packing | None = None
    recorded: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Checkpoint, export: str | None = None) -> Decoding:
        """Look at the names of a checkpoint; no weights are read.

        Args:
            export: a format of `moectl.compress.export`, for an export.

        Raises:
            UsageError: there is no such format.
            InputError: it is not coded, transformers cannot build its model, or its experts do not fit the format.
        """
        if not is_coded(source):
            raise InputError(
                f"{escape(source.name)} is not coded.",
                "Its config.json has no quantization_config of quant_method qmoe.",
                "Give what `moectl compress qmoe` made.",
            )
        model = _plain_model(source)
        coded = stored.coded(model, source.tensors) | stored.packed(model, source.tensors)
        if not coded:
            raise InputError(
                f"{escape(source.name)} has no coded tensor, and its config.json says so.",
                "They do not belong together.",
                "Fetch the checkpoint again.",
            )
        used = {ref.name for parts in coded.values() for ref in parts.values()}
        plain = [name for name in source.tensors if name not in used]
        model._weight_conversions = native(model, plain)
        layers: dict[str, list[str]] = defaultdict(list)
        for name in (*coded, *_taken_apart(model, plain)):
            found = _LAYER.match(name)
            layers[found[1] if found else OUTSIDE].append(name)
        abouts = (source.read(parts["about"].name) for parts in coded.values() if "about" in parts)
        way = packing(export, abouts) if export else None
        recorded = read_provenance(source.path)["tensors"] if (source.path / PROVENANCE).exists() else {}
        return cls(source, model, coded, {layer: tuple(names) for layer, names in layers.items()}, way, recorded)

    def describe(self, layer: str) -> dict[str, Tensor]:
        """What a layer becomes, on meta.

        Raises:
            InputError: the family's experts cannot be exported.
        """
        repacked, others = self._split(layer)
        tensors = self._apart({name: self._on_meta(name) for names in others for name in names})
        for name in repacked:
            tensors |= imagined_tensors(self.model, name, self._dtype(name), self._way)
        return tensors

    def decode(self, layer: str) -> dict[str, Tensor]:
        """What a layer becomes.

        Raises:
            InputError: the source is damaged, or its experts cannot be exported.
        """
        self._check(layer)
        repacked, others = self._split(layer)
        tensors: dict[str, Tensor] = {}
        for names in sorted(others, key=self._size, reverse=True):  # what needs twice its size, while there is room
            tensors |= self._apart({name: self._read(name) for name in names})
        for name in repacked:
            tensors |= export_tensors(self.model, stored.matrix(self.source, name, self.coded[name]), self._way)
        return tensors

    def origin(self, name: str) -> list[str]:
        """The tensors of the source that a parameter is stored as."""
        return [ref.name for ref in self.coded[name].values()] if name in self.coded else [name]

    def _check(self, layer: str) -> None:
        """Compare with the recorded hashes: most bits of a coded matrix can flip, and it decodes to another one.

        Raises:
            InputError: a tensor is another than was written.
        """
        for ref in (self.source.tensors[each] for name in self.layers[layer] for each in self.origin(name)):
            extent = Extent(ref.file, ref.offset, ref.nbytes)
            if ref.name in self.recorded and examine((extent,), ref.dtype).sha256 != self.recorded[ref.name]:
                raise InputError(
                    f"{escape(str(ref.file))}: {escape(ref.name)} is not what {PROVENANCE} records.",
                    "It was damaged or replaced since it was written, and would be decoded to other weights.",
                    f"Fetch the files again, or compress the model again. If it was meant, remove {PROVENANCE}.",
                )

    @property
    def _way(self) -> Packing:
        assert self.way is not None
        return self.way

    def _split(self, layer: str) -> tuple[list[str], list[list[str]]]:
        """Names in a layer: of what is packed anew, and of what is decoded, together where one tensor is made of it."""
        repacked = [name for name in self.layers[layer] if self.way and "about" in self.coded.get(name, ())]
        others = [name for name in self.layers[layer] if name not in repacked]
        joined = [name for name in others if self._is_joined(name)]
        return repacked, [*([name] for name in others if name not in joined), *([joined] if joined else [])]

    def _size(self, names: list[str]) -> int:
        return sum(self.model.get_parameter_or_buffer(name).numel() for name in names)

    def _is_joined(self, name: str) -> bool:
        """Whether saving makes a tensor of this parameter and others."""
        rules = (rule.reverse_transform() for rule in self.model._weight_conversions[::-1])
        converters = (rule for rule in rules if isinstance(rule, WeightConverter))
        found = next((rule for rule in converters if rule.rename_source_key(name)[1] is not None), None)
        return found is not None and len(found.source_patterns) > 1

    def _apart(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        with quiet():
            apart: dict[str, Tensor] = revert_weight_conversion(self.model, values)
        return apart

    def _on_meta(self, name: str) -> Tensor:
        if name not in self.coded:
            return on_meta(self.source.tensors[name])
        return torch.empty(self.model.get_parameter(name).shape, dtype=self._dtype(name), device="meta")

    def _dtype(self, name: str) -> torch.dtype:
        levels = next((ref for part, ref in self.coded[name].items() if part in _LEVELS), None)
        return torch.float32 if levels is None else stored.on_meta(levels).dtype  # without levels, reading will say so

    def _read(self, name: str) -> Tensor:
        if name not in self.coded:
            return read_tensor(self.source.tensors[name])
        return stored.value(self.source, name, self.coded[name], self.model.get_parameter(name).shape)


def _plain_model(source: Checkpoint) -> PreTrainedModel:
    config = read_config(source)
    del config.quantization_config
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # the sizes in a config.json can break a constructor in any way
        raise unusable(source, "is no language model transformers can build", error) from error


def _taken_apart(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Names on disk that are names in memory, and that saving would change: they belong with what is decoded."""
    rules: list[WeightTransform] = model._weight_conversions
    inverses = [rule.reverse_transform() for rule in rules[::-1]]
    in_memory = model.state_dict().keys()
    return [
        name
        for name in names
        if name in in_memory and _renamed(name, rules) == name and _renamed(name, inverses, reverse=True) != name
    ]


def _renamed(name: str, rules: list[WeightTransform], *, reverse: bool = False) -> str:
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamed: str = rename_source_key(name, renamings, converters, reverse=reverse)[0]
    return renamed
