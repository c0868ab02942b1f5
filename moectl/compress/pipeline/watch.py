"""What the matrices in some parameters are multiplied with, whatever the family's code looks like.

Below torch's functions every product of matrices is one of a few operators, and their operands are views of the
parameters: where a view begins says which expert's matrix it is, and its strides how the matrix lies there.

Legend: S rows, R outputs, N inputs of a matrix, G matrices of a batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_OPERANDS = {_ATEN.mm: (0, 1), _ATEN.bmm: (0, 1), _ATEN.addmm: (1, 2), _ATEN.baddbmm: (1, 2), _ATEN.mv: (0, 1)}
"""Operator -> which of its arguments are multiplied."""


@dataclass(frozen=True, slots=True)
class Product:
    """Rows that one matrix was multiplied with.

    Attributes:
        name: of the parameter it lies in.
        number: which of the parameter's matrices it is.
        outputs: R.
        transposed: the parameter holds it as [N, R].
        x_SN: the rows.
    """

    name: str
    number: int
    outputs: int
    transposed: bool
    x_SN: Tensor


class Watch(TorchDispatchMode):
    """Inside, `see` is told of every product with a matrix that lies in one of the parameters.

    Products with those in `unread` are not computed: zeros stand for them.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], see: Callable[[Product], None], unread: Collection[str] = ()
    ) -> None:
        super().__init__()
        self._names = {_memory(parameter): name for name, parameter in parameters.items()}
        self._start = {name: parameter.storage_offset() for name, parameter in parameters.items()}
        self._see = see
        self._unread = unread

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _OPERANDS.get(function.overloadpacket)
        if places is None:
            return function(*args, **(kwargs or {}))
        left, right = (args[place] for place in places)
        products = list(self._products(left, right))
        for product in products:
            self._see(product)
        if products and all(product.name in self._unread for product in products):
            return left.new_zeros((*left.shape[:-1], *right.shape[1:][-1:]))
        return function(*args, **(kwargs or {}))

    def _products(self, left: Tensor, right: Tensor) -> Iterator[Product]:
        if _memory(right) in self._names:
            yield from self._of(right, left)
        elif _memory(left) in self._names:  # W x with columns for rows
            yield from self._of(left.mT, right[:, None].mT if right.ndim == 1 else right.mT)

    def _of(self, matrix: Tensor, x: Tensor) -> Iterator[Product]:
        """The products of rows x [..., S, N] with a matrix [..., N, R]."""
        name = self._names[_memory(matrix)]
        inputs, outputs = matrix.shape[-2:]
        first = (matrix.storage_offset() - self._start[name]) // (inputs * outputs)
        transposed = matrix.stride(-1) == 1 and (matrix.stride(-2) != 1 or outputs == 1)
        for number, x_SN in enumerate(x if x.ndim == 3 else x[None]):
            yield Product(name, first + number, outputs, transposed, x_SN)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
