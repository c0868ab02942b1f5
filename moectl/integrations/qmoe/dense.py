"""Dense weights of 8 or 4 bits in a model, as compressed-tensors packs them, unpacked whenever they are needed.

    NAME.weight_packed   int32 [R, words]     rows of N whole numbers, offset by half their range
    NAME.weight_scale    bf16|f16|f32 [R, G]  a weight is its number times its group's scale; a group has N / G weights

These are tensors of its format "pack-quantized" (the third of that format, `weight_shape`, the model knows), and are
read here without it. How many bits a number has follows from the shapes, because no row is narrower than `NARROWEST`.

Legend: R rows (outputs, or words of a vocabulary), N columns, G groups in a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.text import escape

PARTS = ("weight_packed", "weight_scale")
NARROWEST = 32
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def decode(packed: Tensor, scale: Tensor, width: int) -> Tensor:
    """The weights [R, N], of the scale's type, from [R, words] and [R, G]."""
    raw = packed.contiguous().view(torch.uint8)
    if _bits(packed.shape[-1], width) == 8:
        number_RN = raw.view(torch.int8)[:, :width] ^ -128
    else:
        number_RN = torch.stack((raw & 15, raw >> 4), -1).flatten(1)[:, :width].view(torch.int8) - 8
    weight_RGn = number_RN.to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    return weight_RGn.mul_(scale[..., None]).flatten(1)


def check(name: str, parts: Mapping[str, Tensor], shape: Iterable[int]) -> None:
    """Refuse tensors that do not make up a weight of a shape.

    Args:
        name: of the weight, for the message.
        parts: those of `PARTS` that there are, possibly on meta.
        shape: [R, N].

    Raises:
        InputError: one is missing, or has another type or shape.
    """
    rows, width = shape
    problem = next((f"has no {part}" for part in PARTS if part not in parts), None)
    if problem is None:
        packed, scale = (parts[part] for part in PARTS)
        words = (ceil(width * 8 / 32), ceil(width * 4 / 32))
        fits = packed.dtype == torch.int32 and packed.ndim == 2 and packed.shape[1] in words
        fits = fits and scale.dtype in FLOATS and scale.ndim == 2 and len(packed) == len(scale) == rows
        if not fits or not scale.shape[1] or width % scale.shape[1]:
            problem = ", ".join(f"{part} is {parts[part].dtype} {list(parts[part].shape)}" for part in PARTS)
    if problem is not None:
        raise InputError(
            f"{escape(name)} {[rows, width]}: {problem}.",
            "The packed weight is damaged, or config.json is that of another model.",
            "Fetch the files again, or compress the model again.",
        )


def hold(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Let modules of a model that is on meta hold their weights as a checkpoint stores them.

    A weight that is tied to a stored one is held too, and the tensors are tied in its stead.

    Args:
        model: transformers' model; what it knows of its ties changes with it.
        stored: tensors of the checkpoint, on meta, by their names in memory; those of other kinds are passed over.

    Raises:
        InputError: packed tensors do not have the shapes of the model's weight, or one is missing.
    """
    paths = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    for path in paths:
        _hold(model, path, path, stored)
    tied: dict[str, set[str]] = defaultdict(set)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        tied[source] |= {target.removesuffix(".weight"), source.removesuffix(".weight")}
    for group in tied.values():
        for path in group - paths if group & paths else ():
            _hold(model, path, min(group & paths), stored)
    now_held = {path for path, _ in held(model)}

    def packed(path: str, target: str, source: str) -> dict[str, str]:
        if f"{path}{source}".removesuffix(".weight") not in now_held:
            return {target: source}
        names = target.removesuffix("weight"), source.removesuffix("weight")
        return {f"{names[0]}{part}": f"{names[1]}{part}" for part in PARTS}

    _retie(model, packed)


def release(model: nn.Module) -> None:
    """Give every module its plain weight back, of the type the model computes in; tied ones share it again."""
    weights: dict[int, nn.Parameter] = {}
    for _, module in held(model):
        key = module.weight_packed.data_ptr()
        if key not in weights:
            weights[key] = _parameter(module.weight)
        for part in PARTS:
            del module._parameters[part]
        del module._buffers["_like"]
        if isinstance(module, nn.Embedding):
            module.padding_idx = module.__dict__.pop("_padding_idx")
        module.__class__ = type(module).__bases__[1]
        module.weight = weights[key]

    def plain(_path: str, target: str, source: str) -> dict[str, str]:
        if target.endswith(PARTS[1]):
            return {}
        return {target.removesuffix("_packed"): source.removesuffix("_packed")}

    _retie(model, plain)


def held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that hold packed weights, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _Packed))


class _Packed(nn.Module):
    """What a class of modules gains when its weight is packed: `weight` is unpacked each time it is read.

    So a family may use the weight in any way it likes, in a forward of its own or from outside.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    _like: Tensor

    @property
    def weight(self) -> Tensor:
        """[R, N], of the type the model computes in."""
        return self._unpacked(self.weight_packed, self.weight_scale)

    def _unpacked(self, packed: Tensor, scale: Tensor) -> Tensor:
        weight: Any = decode(packed, scale, _width(self)).to(self._like.dtype)
        weight._is_hf_initialized = True  # what initialises buffers beside it leaves it alone
        return weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What is stored is not trained, whoever sets it."""
        if param is not None and name in PARTS:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Scales are moved as whole numbers are, and never converted: what is stored stays as it was, bit for bit."""
        scale = self._parameters.pop("weight_scale")
        assert scale is not None
        super()._apply(function, recurse)
        moved = function(scale.data.view(torch.int32 if scale.itemsize == 4 else torch.int16)).view(scale.dtype)
        if scale.is_meta:
            scale = _parameter(moved)
        else:
            scale.data = moved  # the same parameter, which may be tied
        self._parameters["weight_scale"] = scale
        return self


class _PackedEmbedding(_Packed):
    """An embedding unpacks the rows it looks up."""

    _rows: Tensor | None = None

    def forward(self, input: Tensor) -> Any:
        rows, places = input.unique(return_inverse=True)
        self._rows = rows
        try:
            return super().forward(places)
        finally:
            self._rows = None

    @property
    def weight(self) -> Tensor:
        """[R, N]; during a look-up the rows that are looked up, in rising order."""
        if self._rows is None:
            return super().weight
        return self._unpacked(self.weight_packed[self._rows], self.weight_scale[self._rows])


@cache
def _packed(kind: type[nn.Module]) -> type[nn.Module]:
    gained = _PackedEmbedding if issubclass(kind, nn.Embedding) else _Packed
    return type(kind.__name__, (gained, kind), {"__module__": kind.__module__})


def _hold(model: nn.Module, path: str, origin: str, stored: Mapping[str, Tensor]) -> None:
    """Make the module at `path` one that holds tensors like those stored for the one at `origin`."""
    module: Any = model.get_submodule(path)
    weight = module.weight
    parts = {part: stored[f"{origin}.{part}"] for part in PARTS if f"{origin}.{part}" in stored}
    check(f"{origin}.weight", parts, weight.shape)
    del module._parameters["weight"]
    for part, tensor in parts.items():
        module.register_parameter(part, _parameter(torch.empty_like(tensor)))
    module.register_buffer("_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
    if isinstance(module, nn.Embedding):  # it speaks of rows of the whole table, and matters for gradients alone
        module.__dict__["_padding_idx"], module.padding_idx = module.padding_idx, None
    module.__class__ = _packed(module.__class__)
    # transformers would unpack it to fill it with random numbers, but has to compute buffers that are not stored.
    module._is_hf_initialized = module._non_persistent_buffers_set == {"_like"}


def _retie(model: nn.Module, change: Callable[[str, str, str], dict[str, str]]) -> None:
    """Change all that transformers keeps of ties, from the path of a model in it, a target and a source."""
    for path, module in model.named_modules():
        for where in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(module, where, None)
            if ties:
                prefix = f"{path}." if path else ""
                changed = [change(prefix, target, source) for target, source in ties.items()]
                setattr(module, where, {name: other for part in changed for name, other in part.items()})


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bits(words: int, width: int) -> int:
    return 8 if words == ceil(width * 8 / 32) else 4


def _width(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.embedding_dim
