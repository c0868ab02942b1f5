"""The dense part of a model in 8 or 4 bits: attention, shared experts, dense layers, embedding and head.

compressed-tensors quantises and packs; here is what is taken, and which of its scales. Numbers are symmetric. At 8
bits a row has one scale, the largest weight's. At 4 bits a group of 128 weights (64 or 32 where the width demands it)
has the one of eight scales, from the largest weight's down to 65 % of it, that has the least squared error; embedding
and head keep 8 bits, and so does a weight whose width is no multiple of 32.

Left as they are: routers and gates, T5's table of distances, whatever is narrower or shorter than `NARROWEST` (such as
projections to a few numbers that steer a whole layer), norms, convolutions, and all else that is no weight of an
`nn.Linear` or `nn.Embedding`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import InputError, MachineError, UsageError
from moectl.integrations.qmoe.dense import NARROWEST, PARTS, decode
from moectl.text import escape

GROUP_SIZES = (128, 64, 32)
SHRUNK = tuple(1 - step / 20 for step in range(8))
_CHUNK = 1 << 24
_LEFT = re.compile(r"(^|\.)(gate|[^.]*router[^.]*|[^.]*expert_gate|relative_attention_bias)(\.|$)")
_IN_A_LAYER = re.compile(r"\.\d+(\.|$)")


def _nothing(_name: str) -> bool:
    return False


@dataclass(frozen=True)
class DensePart:
    """How `--dense int8` and `--dense int4` round.

    Attributes:
        bits: 8 or 4.
        dtype: of scales and of decoded weights; without it that of each weight. The source's, where the weights that
            are taken have been converted for computing.
    """

    bits: int = 8
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"The dense part cannot have {self.bits} bits.", "", "Give 8 or 4.")

    def taken(self, prefix: str, module: nn.Module, skip: Callable[[str], bool] = _nothing) -> list[str]:
        """The names of the parameters that `take` would replace; the module may be on meta."""
        return [f"{path}.weight" for path, _ in self._modules(prefix, module, skip)]

    @torch.no_grad()
    def take(self, prefix: str, module: nn.Module, skip: Callable[[str], bool] = _nothing) -> dict[str, Tensor]:
        """Round weights of a module in place to what a reader decodes, and return what to store.

        Of weights that are tied, the first in the module is stored.

        Args:
            prefix: the module's name in the model ("model.layers.0"), "" for the model itself.
            module: whose weights are rounded.
            skip: names of parameters that are somebody else's, such as those of experts.

        Returns:
            tensors on the CPU by name: `PARTS` of integrations/qmoe/dense.py in the place of each `weight`.

        Raises:
            InputError: a weight is NaN or infinite.
            MachineError: compressed-tensors is not installed.
        """
        tensors: dict[str, Tensor] = {}
        for path, owner in self._modules(prefix, module, skip):
            weight = owner.weight.data
            parts = _packed(path, weight, self._bits(path, owner), self.dtype or weight.dtype)
            weight.copy_(decode(*parts, weight.shape[1]))
            tensors |= {f"{path}.{part}": tensor.cpu() for part, tensor in zip(PARTS, parts, strict=True)}
        return tensors

    def config(self) -> dict[str, Any]:
        """What config.json says about it; readers need the tensors alone."""
        return {"format": "pack-quantized", "bits": self.bits}

    def _modules(self, prefix: str, module: nn.Module, skip: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
        seen = set()
        for name, owner in module.named_modules():
            path = ".".join(part for part in (prefix, name) if part)
            weight = owner._parameters.get("weight")
            if not isinstance(owner, nn.Linear | nn.Embedding) or weight is None or id(weight) in seen:
                continue
            fits = weight.is_floating_point() and min(weight.shape) >= NARROWEST
            if fits and not _LEFT.search(path) and not skip(f"{path}.weight"):
                seen.add(id(weight))
                yield path, owner

    def _bits(self, path: str, owner: nn.Module) -> int:
        inside = isinstance(owner, nn.Linear) and owner.in_features % GROUP_SIZES[-1] == 0 and _IN_A_LAYER.search(path)
        return self.bits if inside else 8


def _packed(path: str, weight: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [R, words] and scales [R, G], a few rows at a time."""
    if not weight.isfinite().all():
        raise InputError(
            f"{escape(path)}.weight has NaN or infinite values.",
            "They have no place on a grid, and the model would compute NaN.",
            "Compress another checkpoint, or find out where the values come from (`moectl verify`).",
        )
    rows = max(1, _CHUNK // weight.shape[1])
    chunks = [_quantised(chunk.float(), bits, dtype) for chunk in weight.split(rows)]
    packed, scales = zip(*chunks, strict=True)
    return torch.cat(packed), torch.cat(scales)


@cache
def _meaning(bits: int, group_size: int | None) -> Any:
    """compressed-tensors' `QuantizationArgs` for symmetric numbers, in groups or by row."""
    if find_spec("compressed_tensors") is None:
        raise MachineError(
            "compressed-tensors is not installed.",
            "It quantises what is not an expert's to 8 or 4 bits.",
            "pip install compressed-tensors, or leave these weights alone with --dense bf16.",
        )
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "channel" if group_size is None else "group"
    return QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=group_size)


def _quantised(weight_RN: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = weight_RN.shape[1]
    size = width if bits == 8 else next(size for size in GROUP_SIZES if width % size == 0)
    meaning = _meaning(bits, None if size == width else size)
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    largest_RG = weight_RN.abs().unflatten(1, (-1, size)).amax(-1)
    best = torch.full_like(largest_RG, torch.inf)
    scale_RG = torch.ones_like(largest_RG, dtype=dtype)  # stays where all is next to zero and scales vanish in fp16
    for factor in SHRUNK if bits == 4 else SHRUNK[:1]:
        tried, _ = calculate_qparams(-factor * largest_RG, factor * largest_RG, meaning)
        tried = tried.to(dtype)
        numbers = quantize(weight_RN, tried.float(), None, meaning)
        error = (dequantize(numbers, tried.float(), args=meaning).to(dtype) - weight_RN).unflatten(1, (-1, size))
        squared = error.square().sum(-1)
        scale_RG = torch.where(squared < best, tried, scale_RG)
        best = torch.minimum(squared, best)
    numbers = quantize(weight_RN, scale_RG.float(), None, meaning, dtype=torch.int8)
    return pack_to_int32(numbers, bits), scale_RG
