"""One tensor of a checkpoint as a torch tensor, read with pread into memory of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""safetensors type name -> torch type."""


def read_tensor(ref: TensorRef) -> Tensor:
    """The tensor `ref` points at, in its type on disk.

    The bytes are read, never mapped: a file cut while in use is an error here and a SIGBUS under mmap. They
    land in memory that torch allocated, so that matmuls see the same alignment at every load.

    Raises:
        InputError: the file ends before the tensor does.
    """
    raw = torch.empty(ref.nbytes, dtype=torch.uint8)
    target, position = raw.numpy(), 0
    for piece in Checkpoint.chunks(ref):
        target[position : position + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        position += len(piece)
    return raw.view(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)


def on_meta(ref: TensorRef) -> Tensor:
    """The shape and type of a tensor without its bytes."""
    return torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype], device="meta")


class OnDisk:
    """A tensor that is read when it is indexed, as transformers' loader does with safetensors' slices."""

    def __init__(self, ref: TensorRef) -> None:
        self._ref = ref

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self._ref)[index]
