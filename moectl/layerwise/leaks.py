"""Whether a layer keeps something that it does not return, for a later layer to find."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Inside, notes every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def kept(self, *known: Any) -> list[tuple[int, ...]]:
        """The shapes of tensors that somebody still holds, beside those whose memory is that of `known` ones."""
        memory = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(known) if isinstance(leaf, Tensor)}
        if self._alive(memory):
            gc.collect()  # it takes a quarter of a second, and there is seldom anything
        return self._alive(memory)

    def _alive(self, known: set[int]) -> list[tuple[int, ...]]:
        alive = (made() for made in self._made)
        return [tuple(t.shape) for t in alive if t is not None and t.untyped_storage().data_ptr() not in known]
