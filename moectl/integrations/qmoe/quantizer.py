"""`quant_method` "qmoe" for transformers: a model gets its coded parameters before weights are loaded into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform, build_glob_alternation
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moectl.checkpoint.header import read_header
from moectl.codecs.blob import Blob
from moectl.errors import InputError
from moectl.integrations.complete import CODED
from moectl.integrations.qmoe import dense, stored
from moectl.integrations.qmoe.coded import Coded, fits, shape_of
from moectl.integrations.qmoe.host import replace, restore
from moectl.integrations.qmoe.rules import native, spare


class QmoeConfig(QuantizationConfigMixin):
    """What config.json says of a coded checkpoint. All of it is kept; loading needs the tensors alone.

    Attributes:
        dequantize: load plain weights and forget that they were coded.
    """

    def __init__(self, dequantize: bool = False, **said: Any) -> None:
        self.dequantize = dequantize
        for name, value in {**said, "quant_method": CODED}.items():
            if not hasattr(type(self), name):  # a file may say anything, and must not replace a method
                setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {name: value for name, value in super().to_dict().items() if name != "dequantize"}


class QmoeQuantizer(HfQuantizer):
    """Loads and saves models with coded parameters; it cannot make one."""

    requires_calibration = True

    def __init__(self, quantization_config: QmoeConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._coded: dict[str, stored.Parts] = {}
        self._stored: frozenset[str] = frozenset()
        self._plain: frozenset[str] = frozenset()
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_options: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise InputError(
                "A checkpoint with coded experts cannot be sharded over devices.",
                "Codewords have no fixed length, so there is no place to cut them.",
                "Load it on one device, or shard what `moectl decompress` makes of it.",
            )
        tensors = {name: ref for file in checkpoint_files or () for name, ref in read_header(Path(file)).items()}
        self._coded, packed = stored.coded(model, tensors), stored.packed(model, tensors)
        refs = {f"{name}.{part}": ref for name, parts in self._coded.items() for part, ref in parts.items()}
        held = {
            f"{name.removesuffix('weight')}{part}": ref for name, parts in packed.items() for part, ref in parts.items()
        }
        on_disk = {ref.name for ref in (*refs.values(), *held.values())}
        self._stored = frozenset((*on_disk, *refs, *held))
        self._plain = frozenset(tensors.keys() - on_disk)
        for name, parts in self._coded.items():
            old = model.get_parameter(name)
            buffers = {part: stored.on_meta(ref) for part, ref in parts.items()}
            replace(model, name, Coded(name, buffers, old.shape, old.dtype))
        dense.hold(model, {name: stored.on_meta(ref) for name, ref in held.items()})
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *model: PreTrainedModel
    ) -> list[WeightTransform]:
        """transformers' rules for names and layouts, which leave the names of what is stored coded as they are."""
        rules: list[WeightTransform] = super().update_weight_conversions(weight_conversions, *model)
        for rule in rules:
            spare(rule, self._stored)
        return rules

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_options: Any) -> PreTrainedModel:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(_check, map(model.get_submodule, self._coded), self._coded.values()))
        _convert(model, self._dtypes)
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        restore(model)
        dense.release(model)
        model._weight_conversions = native(model, self._plain)
        return model

    def is_serializable(self) -> bool:
        """Tensors are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def register() -> None:
    """Tell transformers of the method, once."""
    if CODED not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(CODED)(QmoeConfig)
        register_quantizer(CODED)(QmoeQuantizer)
    assert CODED in AUTO_QUANTIZER_MAPPING


def _convert(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters the types they should have; transformers 5.17 leaves them the file's where it renames them."""
    kept = model._get_dtype_plan(model.dtype)
    special = build_glob_alternation(list(kept))[0] if kept else None
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype) and not (special and special.search(name)):
            parameter.data = parameter.data.to(dtypes[name])


def _check(coded: Any, parts: stored.Parts) -> None:
    """Refuse a coded parameter whose tensors do not fit together, or that is not the model's.

    Raises:
        InputError: as said.
    """
    try:
        found = coded.stored()
        if isinstance(found, Blob):
            found.check()
    except InputError as error:
        raise stored.in_file(error, parts) from error
    if not fits(found, coded.shape):
        raise stored.misfit(coded.name, shape_of(found), coded.shape, parts)
