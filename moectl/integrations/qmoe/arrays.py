"""Tensors as numpy arrays and back, bfloat16 included, and zeros that take no memory until they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array; it shares the memory of one on a CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """The inverse of `array_of`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the type and on the device of a tensor. On a CPU, pages nobody writes are never there: torch's are."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, f"i{like.itemsize}")).view(like.dtype)
