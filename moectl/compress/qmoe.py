"""A checkpoint whose experts are coded: the layer files of the pipeline, and every other byte of the source.

The pipeline leaves coded tensors under the names that parameters have in memory, because there the experts of a layer
are one tensor. What is not coded keeps its name and its bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moectl.checkpoint.expressions import Copy
from moectl.checkpoint.kept import kept_file
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.codecs.matrix import parse
from moectl.compress.export import Packing, export_tensors, packing
from moectl.compress.pipeline.report import LayerReport, MatrixReport, reports, to_metadata
from moectl.compress.qmoe_card import qmoe_card
from moectl.families.components import experts_and_top_k
from moectl.integrations.qmoe.arrays import array_of
from moectl.integrations.qmoe.dense import PARTS as DENSE_PARTS
from moectl.layerwise.loading import WeightLoader
from moectl.layerwise.skeleton import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "compression.json"
"""The file of an output that says what became of every expert."""


@dataclass(frozen=True)
class Coded:
    """What the pipeline made of a model.

    Attributes:
        source: the model.
        files: the layer files, in order, and those that replace parts of them.
        layers: what became of every expert, by layer.
        parts: parameter in memory -> what stands for it in the files, for all that they replace.
        origin: parameter in memory -> the tensors of the source that it is made of, for the whole model.
        experts: those of the replaced parameters that are experts'.
        ignored: tensors of the source that the model has no place for, such as layers that predict further tokens.
    """

    source: Checkpoint
    files: tuple[Checkpoint, ...]
    layers: Sequence[LayerReport]
    parts: Mapping[str, Sequence[Copy]]
    origin: Mapping[str, Sequence[str]]
    experts: frozenset[str]
    ignored: frozenset[str]

    @property
    def of_experts(self) -> int:
        """How many numbers of the source are experts'."""
        return sum(math.prod(self.source.tensors[name].shape) for each in self.experts for name in self.origin[each])


def coded(source: Checkpoint, paths: Sequence[Path]) -> Coded:
    """What lies in the files that the pipeline made of `source`.

    Raises:
        InputError: transformers cannot build the model.
    """
    files = tuple(Checkpoint.of_file(path) for path in paths)
    model = build(source, torch.float32, "cpu", two_stacks=True)
    loader = WeightLoader(model, source, torch.float32, "cpu")
    known = frozenset(loader.names)
    parts: dict[str, list[Copy]] = {}
    for place, file in enumerate(files, start=1):
        for name in file.tensors:
            parts.setdefault(stands_for(name), []).append(Copy(name, place))
    layers = reports(paths)
    return Coded(
        source,
        files,
        layers,
        parts,
        loader.sources,
        frozenset(matrix.parameter for layer in layers for matrix in layer.matrices),
        frozenset(name for target, names in loader.sources.items() if target not in known for name in names),
    )


def exported(made: Coded, form: str, place: Path) -> tuple[Coded, dict[str, Any]]:
    """The experts as compressed-tensors packs them, in files in `place`, and the `quantization_config` that says so.

    Raises:
        InputError: the family has no names for the matrices of single experts, or their groups fit no kernel.
    """
    model = build(made.source, torch.float32, "meta", two_stacks=True)
    names = sorted(made.experts)
    way = packing(form, (_read(made, name, f"{name}.about") for name in names))
    files, parts = [made.source, *made.files], dict(made.parts)
    for name in names:
        path = place / f"{form}-{name}.safetensors"
        path.unlink(missing_ok=True)  # soon made again, and nobody knows whether the disk has kept it
        file = kept_file(path, partial(_exported, made, name, model, way))
        parts[name] = [Copy(tensor, len(files)) for tensor in file.tensors]
        files.append(file)
    exported = replace(made, files=tuple(files[1:]), parts=parts)
    return replace(exported, layers=[_with_bits(exported, layer) for layer in made.layers]), way.config()


def _with_bits(made: Coded, layer: LayerReport) -> LayerReport:
    """The report with the bits that matrices have in the files of an export, those of one parameter as many each."""
    count = Counter(matrix.parameter for matrix in layer.matrices)

    def bits(matrix: MatrixReport) -> float:
        copies = made.parts[matrix.parameter]
        nbytes = sum(made.files[copy.source - 1].tensors[copy.tensor].nbytes for copy in copies)
        return 8 * nbytes / count[matrix.parameter] / (matrix.rows * matrix.columns)

    return replace(layer, matrices=tuple(replace(matrix, bits=bits(matrix)) for matrix in layer.matrices))


def _exported(made: Coded, parameter: str, model: PreTrainedModel, way: Packing) -> Mapping[str, np.ndarray]:
    blob = parse(parameter, {copy.tensor: _read(made, parameter, copy.tensor) for copy in made.parts[parameter]})
    return {name: array_of(tensor) for name, tensor in export_tensors(model, blob, way).items()}


def _read(made: Coded, parameter: str, tensor: str) -> np.ndarray:
    copy = next(copy for copy in made.parts[parameter] if copy.tensor == tensor)
    return made.files[copy.source - 1].read(tensor)


def plan_qmoe(
    made: Coded,
    recipe: Mapping[str, Any],
    quantization: Mapping[str, Any],
    shard_bytes: int,
) -> Plan:
    """The plan of the compressed checkpoint; every tensor is copied, from the source or from a layer file.

    Args:
        recipe: all that the files follow from.
        quantization: the `quantization_config` of its config.json.
    """
    source = made.source
    tensors = tuple(_tensors(made))
    experts, top_k = experts_and_top_k(source.config)
    used = [ref for name, ref in source.tensors.items() if name not in made.ignored]
    parameters, source_bytes = sum(math.prod(ref.shape) for ref in used), sum(ref.nbytes for ref in used)
    of_experts = made.of_experts
    idle = of_experts * (experts - top_k) // experts if experts and top_k else 0
    expert_parts = {copy for name in made.experts for copy in made.parts[name]}
    expert_bytes = sum(tensor.nbytes for tensor in tensors if tensor.expression in expert_parts)
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    facts = {
        "family": source.model_type,
        "source_family": source.model_type,
        "source_parameters": parameters,
        "source_bytes": source_bytes,
        "parameters": parameters,
        "active_parameters": parameters - idle,
        "expert_parameters": of_experts,
        "weight_bytes": weight_bytes,
        "expert_bytes": expert_bytes,
        "bits_per_parameter": 8 * weight_bytes / parameters,
        "bits_per_expert_parameter": 8 * expert_bytes / of_experts,
        "ratio": source_bytes / weight_bytes,
        "ignored": len(made.ignored),
    }
    report = {
        "schema": "moectl.compression/1",
        "layers": [json.loads(to_metadata(each)["report"]) for each in made.layers],
    }
    return Plan(
        sources=(source, *made.files),
        tensors=tensors,
        recipe=recipe,
        config={**source.config, "quantization_config": dict(quantization)},
        shard_bytes=shard_bytes,
        files={"README.md": qmoe_card(source, recipe, facts), REPORT: json.dumps(report, indent=1) + "\n"},
        facts=facts,
    )


def stands_for(name: str) -> str:
    """The parameter in memory that a tensor of a layer file is a part of."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.weight" if part in DENSE_PARTS else owner


def _tensors(made: Coded) -> Iterator[OutputTensor]:
    """In the source's order; what stands for a parameter comes where the first tensor it is made of was."""
    sources = (made.source, *made.files)
    parameter_of = {name: each for each in made.parts for name in made.origin.get(each, ())}
    done: set[str] = set()
    for name in made.source.tensors:
        parameter = parameter_of.get(name)
        if name in made.ignored or parameter in done:
            continue
        if parameter is None:
            yield planned(name, Copy(name), sources)
            continue
        done.add(parameter)
        yield from (planned(copy.tensor, copy, sources) for copy in made.parts[parameter])
    for parameter, copies in made.parts.items():
        if parameter not in done:  # made of a tensor that came before, with another parameter
            yield from (planned(copy.tensor, copy, sources) for copy in copies)
