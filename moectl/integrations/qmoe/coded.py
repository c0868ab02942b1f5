"""A coded parameter in a model: the tensors it is stored as, and the matrices they stand for when these are needed.

Legend: E experts, R rows (output features), N weights in a row (input features).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import ternary
from moe_kernels.ternary import TernaryExperts
from moectl.codecs.blob import Blob
from moectl.codecs.grid import GridBlob
from moectl.codecs.matrix import parse
from moectl.codecs.tables import RATIOS, table
from moectl.integrations.qmoe.arrays import array_of, zeros
from moectl.integrations.qmoe.grids import GridExperts

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Coded(nn.Module):
    """Stands under the name of the parameter it replaces, with a buffer for every tensor that stores it.

    A model that is moved or converted moves these buffers and keeps their types: what is stored stays as it was, bit
    for bit, and what is decoded has the type the parameter would have.

    Attributes:
        name: of the parameter, for messages.
        shape: of the parameter: [E, R, N], [R, N] or [E * R, N]; R and N swapped where a family has them so.
    """

    _like: Tensor

    def __init__(self, name: str, parts: Mapping[str, Tensor], shape: Iterable[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.shape = torch.Size(shape)
        self._parts = tuple(parts)
        for part, tensor in parts.items():
            self.register_buffer(part, tensor)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        self._made: tuple[TernaryExperts | GridExperts, bool] | None = None
        self._is_hf_initialized = True  # families' initialisation takes it for their parameter, and then leaves it

    @property
    def dtype(self) -> torch.dtype:
        """That of the decoded weights; it follows the model's."""
        return self._like.dtype

    @property
    def transposed(self) -> bool:
        """Whether the parameter is the transpose of each matrix that is coded."""
        return self._ready()[1]

    def stored(self) -> Blob | GridBlob:
        """What is stored, as arrays; they share its memory if it is on a CPU.

        Raises:
            InputError: the tensors do not fit together.
        """
        return parse(self.name, {f"{self.name}.{part}": array_of(tensor) for part, tensor in self._tensors().items()})

    def experts(self) -> TernaryExperts | GridExperts:
        """What is stored, as kernels take it; E = 1 for a single matrix."""
        return self._ready()[0]

    def forward(self, which: Tensor | None = None) -> Tensor:
        """The parameter's value, of its shape.

        Args:
            which: numbers of the matrices that are needed, among others; the rest are zero then. All if left out.
        """
        experts = self.experts()
        every = torch.arange(experts.experts, device=self._like.device)
        needed = every if which is None or len(every) == 1 else every[torch.isin(every, which.to(every.device))]
        value = zeros((len(every), experts.rows, experts.width), self._like)
        if isinstance(experts, TernaryExperts):
            ternary.decode(experts, torch.full_like(every, -1).index_copy_(0, needed, needed), value)
        else:
            experts.decode(needed, value)
        return (value.mT if self.transposed else value).reshape(self.shape)

    def _ready(self) -> tuple[TernaryExperts | GridExperts, bool]:
        """`experts()` and `transposed`, made when they are first needed."""
        if self._made is None:
            tensors = self._tensors()
            _version, *said, flags = tensors.pop("about").tolist()
            make = self._ternary if "codes" in tensors else self._grid
            self._made = make(tensors, *said), bool(flags)
        return self._made

    def _ternary(self, tensors: Mapping[str, Tensor], number: int, width: int) -> TernaryExperts:
        levels_ER2 = _stacked(tensors["levels"]).to(self.dtype)
        entries = _entries(number, levels_ER2.device)
        return TernaryExperts.of(tensors["codes"], tensors["counts"], levels_ER2, entries, width)

    def _grid(self, tensors: Mapping[str, Tensor], bits: int, width: int, group: int) -> GridExperts:
        zeros_ERB = _stacked(tensors["zeros"]) if "zeros" in tensors else None
        return GridExperts(_stacked(tensors["packed"]), _stacked(tensors["scales"]), zeros_ERB, bits, width, group)

    def _tensors(self) -> dict[str, Tensor]:
        """What is stored, by the ends of names."""
        return {part: self.get_buffer(part) for part in self._parts}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Coded:
        """Whatever is stored passes as whole numbers, which are moved and never converted."""
        self._made = None
        for part, tensor in self._tensors().items():
            self._buffers[part] = function(tensor.view(_WHOLE[tensor.itemsize])).view(tensor.dtype)
        self._buffers["_like"] = function(self._like)
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*given)

    def extra_repr(self) -> str:
        """For a model that is printed."""
        return f"{list(self.shape)}, {self.dtype}"


def shape_of(matrix: Blob | GridBlob) -> tuple[int, ...]:
    """That of the parameter a coded matrix or stack stands for, but that a family may have experts' rows in one."""
    *front, rows, columns = matrix.shape
    return (*front, columns, rows) if matrix.transposed else (*front, rows, columns)


def fits(matrix: Blob | GridBlob, shape: tuple[int, ...]) -> bool:
    """Whether it stands for a parameter of this shape: [E, R, N], [R, N], or [E * R, N] as in DBRX."""
    *front, rows, columns = shape_of(matrix)
    return tuple(shape) in ((*front, rows, columns), (prod(front) * rows, columns))


def _stacked(tensor: Tensor) -> Tensor:
    """Of a single matrix as of a stack of one."""
    return tensor.reshape(-1, *tensor.shape[-2:])


@lru_cache(maxsize=2 * len(RATIOS))
def _entries(number: int, device: torch.device) -> Tensor:
    """The table of a number, for kernels: one for all matrices that use it."""
    return torch.from_numpy(table(number).entries).to(device)
