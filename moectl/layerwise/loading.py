"""From tensors on disk to parameters of modules, a few at a time: the one seam to transformers' loader.

Names and shapes on disk are not those in memory (a tensor per expert here, one fused 3-D tensor there), and
the rules between them are transformers' own: `core_model_loading`, semi-internal, alike in 5.17 and 5.23.
They work on meta tensors too, so a checkpoint is checked whole before any of its weights are read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, MachineError
from moectl.layerwise.quiet import quiet
from moectl.layerwise.tensors import OnDisk, on_meta
from moectl.text import escape

_OUT_OF_MEMORY = re.compile(r"MemoryError|can't allocate memory|out of memory")
"""In the text that is all transformers hands on of an error while it converts."""


class WeightLoader:
    """Gives the parameters and saved buffers of a model their values and takes them away, by name in memory.

    A parameter without its value is a single NaN expanded to its shape: it takes no memory, is on the right
    device (models ask embeddings for theirs) and shows when read. On meta it would not: Llama 4 moves its
    token ids to the embedding's device, and looking up meta ids gives uninitialised memory (torch 2.13).

    Peak memory of loading a layer: 1.7 times its size while experts of 36 MB are fused, 2.5 times with experts
    of 4 MB, which malloc keeps for itself (measured, fp32 from bf16); 1 time where nothing is fused.

    Raises:
        InputError: a parameter would be left without a value, a tensor without a place, or shapes differ.
        MachineError: memory ended.
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
        weights = model.state_dict(keep_vars=True)
        self._empty = {name: _placeholder(value, device) for name, value in weights.items()}
        self._unload(self._empty)

    @property
    def names(self) -> list[str]:
        """Every parameter and saved buffer of the model, tied ones under each of their names."""
        return list(self._empty)

    @property
    def sources(self) -> dict[str, list[str]]:
        """The tensors on disk that each parameter or saved buffer is made of."""
        return self._sources

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, the named parameters have their values, in the loader's dtype; afterwards, none again.

        Raises:
            InputError: a weight file has been cut since it was opened.
        """
        try:
            self._load(names)
            yield
        finally:
            self._unload(names)

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            donor = self._donors.get(name, name)
            if donor not in self._sources:  # made from the same tensor as another, which brings it along
                continue
            before = self._get(donor)
            tensors = {source: OnDisk(self._checkpoint.tensors[source]) for source in self._sources[donor]}
            self._refuse_misfits(self._convert(tensors, self._device))
            if donor != name:
                value = self._get(donor)
                self._set(donor, before)
                self._set(name, value)
        empty = [name for name in names if self._get(name) is self._empty[name]]
        if empty:
            raise self._lacking(empty)

    def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, self._empty[name])

    def _find_sources(self) -> dict[str, list[str]]:
        """Name in memory -> names on disk."""
        sources: dict[str, list[str]] = defaultdict(list)
        for name, target in names_in_memory(self._model, self._checkpoint.tensors, self._rules).items():
            sources[target].append(name)
        return dict(sources)

    def _check_all(self) -> dict[str, str]:
        """Convert all tensors on the meta device; returns {parameter without any: a tied one with some}."""
        info = self._convert({name: on_meta(ref) for name, ref in self._checkpoint.tensors.items()}, "meta")
        missing = set(info.missing_keys)
        # Drops what the family itself ignores, such as the multi-token prediction layers of DeepSeek-V3.
        self._model._adjust_missing_and_unexpected_keys(info)
        self._refuse_misfits(info)
        donors = dict(_find_donors(missing, self._model.all_tied_weights_keys))
        if missing - donors.keys():
            raise self._lacking(missing - donors.keys())
        return donors

    def _convert(self, tensors: Mapping[str, OnDisk | Tensor], device: torch.device | str) -> Any:
        config = LoadStateDictConfig(
            weight_mapping=self._rules,
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            device_map={"": device},
        )
        try:
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
                raise self._too_large() from error
            raise
        return info

    def _refuse_misfits(self, info: Any) -> None:
        for name in sorted(info.conversion_errors, key=dot_natural_key):
            if _OUT_OF_MEMORY.search(info.conversion_errors[name]):
                raise self._too_large()
            raise self._bad(f"has {len(self._sources[name])} tensors that do not make up one {name!r}", name)
        for name, found, expected in sorted(info.mismatched_keys):
            raise self._bad(f"makes {name!r} {list(found)}, but its config.json {list(expected)}", name)
        if info.unexpected_keys:
            raise self._bad(f"has {_some(info.unexpected_keys)}, for which the model has no place")

    def _too_large(self) -> MachineError:
        return MachineError(
            f"Memory ended while weights of {escape(self._checkpoint.name)} were read.",
            "Its largest decoder layer has to fit, and what it is made of beside it.",
            "Use a larger machine, or a smaller type (--dtype bfloat16).",
        )

    def _lacking(self, names: Iterable[str]) -> InputError:
        return self._bad(f"has no tensor for {_some(names)}")

    def _bad(self, what: str, name: str = "") -> InputError:
        holes = _holes(self._sources.get(name, ()))
        return InputError(
            f"{escape(self._checkpoint.name)} {escape(what)}" + (f": no {_some(holes)}." if holes else "."),
            "Running it anyway would mean random or ignored weights.",
            "Compare its tensors with its config.json (`moectl inspect`), or download or write it again.",
        )

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(path), leaf, value)


def names_in_memory(model: PreTrainedModel, names: Iterable[str], rules: list[Any] | None = None) -> dict[str, str]:
    """Names on disk -> the names in memory of what they become part of, decided as transformers' loader decides it."""
    rules = get_model_conversion_mapping(model) if rules is None else rules
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    targets = {}
    for name in sorted(names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        targets[name] = target
    return targets


def _placeholder(value: Tensor, device: torch.device | str) -> Tensor:
    if not value.is_floating_point():
        return value
    nothing = torch.full((), torch.nan, dtype=value.dtype, device=device).expand(value.shape)
    return nn.Parameter(nothing, requires_grad=False) if isinstance(value, nn.Parameter) else nothing


def _find_donors(missing: set[str], tied: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(missing parameter, one tied to it that is there), whichever of them the config calls the source."""
    for name in missing:
        source = tied.get(name, name)
        partners = [source, *(target for target, origin in tied.items() if origin == source)]
        there = [partner for partner in partners if partner not in missing]
        if there:
            yield name, there[0]


def _holes(sources: Iterable[str]) -> list[str]:
    """What the numbered tensors of a parameter lack: `experts.3.up_proj` beside `experts.3.gate_proj`."""
    matches = [re.fullmatch(r"(.+\.)(\d+)(\..+)", source) for source in sources]
    found = {match.groups() for match in matches if match}
    complete = {(head, index, tail) for head, _, tail in found for _, index, _ in found}
    return ["".join(parts) for parts in complete - found]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names, key=dot_natural_key)
    shown = ", ".join(repr(escape(name)) for name in ordered[:5])
    return f"{shown} and {len(ordered) - 5} more" if len(ordered) > 5 else shown
