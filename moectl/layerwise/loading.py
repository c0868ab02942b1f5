"""From tensors on disk to parameters of modules, a few at a time: the one seam to transformers' loader.

Names and shapes on disk are not those in memory (one tensor per expert against one fused 3-D tensor), and the rules
between them are transformers' own (`core_model_loading`, semi-internal, the same from 5.17 to 5.23). They are applied
here to part of a model. Because they work on meta tensors too, a checkpoint is checked whole before a byte is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moectl.checkpoint.header import escape
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.layerwise.quiet import quiet
from moectl.layerwise.tensors import OnDisk, on_meta


class WeightLoader:
    """Moves parameters and saved buffers of a meta-device model to `device` and back, by their names in memory.

    Peak memory of a load: what is loaded, plus up to twice its largest parameter while per-expert tensors are fused.

    Raises:
        InputError: a parameter would be left without a value, a tensor has no place, or a shape is wrong.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._rules = get_model_conversion_mapping(model)
        self._sources = self._find_sources()
        self._donors = self._check_all()
        self._empty: dict[str, Tensor] = model.state_dict(keep_vars=True)

    @property
    def names(self) -> list[str]:
        """Every parameter and saved buffer of the model, tied ones under each of their names."""
        return list(self._empty)

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, the named parameters have their values (in the loader's dtype); afterwards they are on meta again."""
        try:
            self._load(names)
            yield
        finally:
            for name in names:
                self._set(name, self._empty[name])

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            donor = self._donors.get(name, name)
            if donor not in self._sources:  # made together with another parameter of the same module (a split tensor)
                continue
            before = self._get(donor)
            tensors = {source: OnDisk(self._checkpoint.tensors[source]) for source in self._sources[donor]}
            self._refuse(self._convert(tensors, self._device))
            if donor != name:
                value = self._get(donor)
                self._set(donor, before)
                self._set(name, value)
        empty = [name for name in names if self._get(name).is_meta]
        if empty:
            raise self._lacking(empty)

    def _find_sources(self) -> dict[str, list[str]]:
        """Name in memory -> names on disk, decided as transformers' loader decides it."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._checkpoint.tensors, key=dot_natural_key):
            target, _ = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, _ = rename_source_key(name, [], [], prefix, state)
            sources[target].append(name)
        return dict(sources)

    def _check_all(self) -> dict[str, str]:
        """Convert every tensor on the meta device; returns {parameter without tensors: the tied one that has some}."""
        shapes = {name: on_meta(ref) for name, ref in self._checkpoint.tensors.items()}
        info = self._convert(shapes, "meta")
        missing = set(info.missing_keys)
        self._model._adjust_missing_and_unexpected_keys(info)  # drops what the family itself ignores, e.g. MTP layers
        self._refuse(info)
        donors = dict(_donors(missing, self._model.all_tied_weights_keys))
        lacking = sorted(missing - donors.keys(), key=dot_natural_key)
        if lacking:
            raise self._lacking(lacking)
        return donors

    def _convert(self, tensors: Mapping[str, OnDisk | Tensor], device: torch.device | str) -> Any:
        config = LoadStateDictConfig(
            weight_mapping=self._rules,
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            device_map={"": device},
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        return info

    def _refuse(self, info: Any) -> None:
        if info.conversion_errors:
            self._refuse_unconverted(min(info.conversion_errors, key=dot_natural_key))
        for name, found, expected in sorted(info.mismatched_keys):
            raise self._bad(
                f"makes {escape(name)} {list(found)}, but its config.json asks for {list(expected)}"
                + _among(self._holes(name))
            )
        if info.unexpected_keys:
            raise self._bad(f"holds {_some(info.unexpected_keys)}, for which the model has no place")

    def _refuse_unconverted(self, name: str) -> None:
        sources = self._sources.get(name, [])
        raise self._bad(
            f"holds {len(sources)} tensors that do not fit together as {escape(name)}" + _among(self._holes(name))
        )

    def _holes(self, name: str) -> list[str]:
        """Tensors that the others of a parameter suggest should be there: `experts.3.up_proj` beside `experts.3.gate_proj`."""
        pieces = [re.split(r"\.(\d+)\.(?=\D*$)", source) for source in self._sources.get(name, [])]
        found = {tuple(piece) for piece in pieces if len(piece) == 3}
        expected = {(head, index, tail) for head, _, tail in found for _, index, _ in found}
        return [f"{head}.{index}.{tail}" for head, index, tail in expected - found]

    def _lacking(self, names: Iterable[str]) -> InputError:
        return self._bad(f"has no tensor for {_some(names)}")

    def _bad(self, what: str) -> InputError:
        return InputError(
            f"{escape(self._checkpoint.name)} {what}.",
            "Running it anyway would mean random or ignored weights.",
            "Compare its tensors with its config.json (`moectl inspect`), or download or write it again.",
        )

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(path), leaf, value)


def _donors(missing: set[str], tied: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs (missing parameter, tied parameter that is there), whichever of them the config calls the source."""
    for name in missing:
        source = tied.get(name, name)
        partners = [source, *(target for target, of in tied.items() if of == source)]
        there = [partner for partner in partners if partner not in missing]
        if there and (name in tied or len(partners) > 1):
            yield name, there[0]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names, key=dot_natural_key)
    shown = ", ".join(repr(escape(name)) for name in ordered[:5])
    return f"{shown} and {len(ordered) - 5} more" if len(ordered) > 5 else shown


def _among(holes: Sequence[str]) -> str:
    return f"; missing: {_some(holes)}" if holes else ""
