"""The best experts to keep, by trying: the subset that changes what a MoE layer computes least (arXiv 2402.14800).

Every expert's output for every token is computed once; a subset then costs one run of the router, which cannot choose
what is dropped, and a weighted sum. Legend: T tokens, K experts per token, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moectl.compress.prune.layout import Layout
from moectl.compress.prune.saliency import Call, not_finite, outputs, watch
from moectl.compress.prune.scores import Measured, naee_name
from moectl.layerwise.model import LayerwiseModel

MOST_TOKENS = 2048
"""Taken of the calibration data: E outputs of each are in memory at once."""
_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_ROUTERS = ("router", "gate")
_BIASES = ("e_score_correction_bias", "expert_bias")


def best_subsets(model: LayerwiseModel, token_BL: np.ndarray, layout: Layout, kept: int) -> Measured:
    """For every layer, 1 for the experts of the subset of `kept` whose output is nearest, 0 for the others, [E].

    Nearest is the least Frobenius norm of what changes in the layer's output, over the first tokens of the data.
    Every layer is seen with all experts of the layers before it in place.

    Raises:
        InputError: a layer's experts cannot be watched, or what they compute is not finite.
    """
    found: dict[int, dict[str, np.ndarray]] = {}

    def look(call: Call) -> None:
        x_TD, token_T = call.x_TD, torch.arange(len(call.x_TD), device=call.x_TD.device)
        y_ETD = torch.stack([outputs(call.experts, x_TD, torch.full_like(token_T, e)) for e in range(layout.experts)])
        if not y_ETD.isfinite().all():
            raise not_finite(layout, call.layer)
        before_TD = _sum(y_ETD, call.index_TK, call.weight_TK)
        least, best = torch.inf, tuple[int, ...]()
        for subset in _subsets(layout, kept):
            after_TD = _sum(y_ETD, *_choice_without(call, layout.experts, subset))
            error = float((after_TD - before_TD).double().square().sum())
            if error < least:
                least, best = error, subset
        mask_E = np.zeros(layout.experts)
        mask_E[list(best)] = 1
        found[call.layer] = {naee_name(kept): mask_E}

    rows = max(1, MOST_TOKENS // token_BL.shape[1])
    watch(model, token_BL[:rows, :MOST_TOKENS], layout, look)
    return found


def _subsets(layout: Layout, kept: int) -> Iterator[tuple[int, ...]]:
    """Every way to keep so many experts, as many in each group."""
    size = layout.experts // layout.groups
    groups = [range(start, start + size) for start in range(0, layout.experts, size)]
    for parts in product(*(combinations(group, kept // layout.groups) for group in groups)):
        yield tuple(expert for part in parts for expert in part)


def _choice_without(call: Call, num_experts: int, subset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The experts and weights [T, K] that the layer's tokens are given when only a subset can be chosen."""
    dropped = sorted({*range(num_experts)} - {*subset})
    choices: list[tuple[Tensor, Tensor]] = []

    def note(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        choices.append((index.flatten(0, -2), weight.flatten(0, -2)))
        return torch.zeros_like(x)

    router = next(each for name in _ROUTERS if isinstance(each := getattr(call.block, name, None), nn.Module))
    forward = router.forward

    def masked(*given: Any, **named: Any) -> Any:
        with _Masked(num_experts, dropped):
            return forward(*given, **named)

    tensors = [*call.block.named_parameters(), *call.block.named_buffers()]
    biases = [tensor for name, tensor in tensors if name.rpartition(".")[2] in _BIASES]
    before = [bias.clone() for bias in biases]
    try:
        for bias in biases:
            bias.data[..., dropped] = -torch.inf
        router.forward = masked
        call.experts.forward = note
        call.again()
    finally:
        del router.forward, call.experts.forward
        for bias, value in zip(biases, before, strict=True):
            bias.data.copy_(value)
    return choices[0]


class _Masked(TorchFunctionMode):
    """Inside, scores of all experts come out of a product with those of the dropped ones at minus infinity."""

    def __init__(self, num_experts: int, dropped: list[int]) -> None:
        super().__init__()
        self._num_experts, self._dropped = num_experts, dropped

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS and result.shape[-1] == self._num_experts:
            result[..., self._dropped] = -torch.inf
        return result


def _sum(y_ETD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The weighted sum [T, D] of the chosen experts' outputs."""
    token_T1 = torch.arange(len(index_TK), device=index_TK.device)[:, None]
    return (y_ETD[index_TK, token_T1] * weight_TK[..., None].to(y_ETD.dtype)).sum(dim=1)
