"""`route`: logits to chosen experts and their weights, one kernel on a GPU, with gradients to the logits; and `top`.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference, target


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    selection_bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """index [T, K] int64, best first and the lower id first among equals; weight [T, K] float32, differentiable.

    Arguments as `reference.route` has them. Scores are float32 whatever the logits are, but float64 of float64, for
    which there is no kernel; and the selection bias gets no gradient, for it never enters a weight.

    Raises:
        ValueError: an unknown score, or groups that do not divide the experts, hold fewer than `top_k` of them, or are
            too small for their score.
    """
    experts = logits_TE.shape[1]
    if score not in ("softmax", "sigmoid") or group_score not in ("top2", "max"):
        raise ValueError(f"score {score!r} is softmax or sigmoid, group_score {group_score!r} is top2 or max")
    if groups > 1 and group_score == "top2" and experts == groups:
        raise ValueError("a group of one expert has no two best scores: use group_score='max'")
    if experts % groups or not 1 <= top_groups <= groups or not 1 <= top_k <= experts // groups * top_groups:
        raise ValueError(f"top {top_k} of {experts} experts in {top_groups} of {groups} groups cannot be chosen")
    double = logits_TE.dtype == torch.float64
    loops = None if double else _loops(logits_TE)
    if loops is None and not double and target.uses_triton(logits_TE):
        given = logits_TE, selection_bias_E, top_k, score, groups, top_groups, group_score, renormalise, scale
        weight_TK, index_TK = _operator(*given)
        return index_TK, weight_TK
    wide_TE = logits_TE if double else logits_TE.float()
    bias_E = None if selection_bias_E is None else selection_bias_E.to(wide_TE.dtype)
    if loops is None:
        return reference.route(
            wide_TE, top_k, score=score, selection_bias_E=bias_E, groups=groups, top_groups=top_groups,
            group_score=group_score, renormalise=renormalise, scale=scale,
        )  # fmt: skip
    # Where the choice is that of the logits and weights are renormalised, those of the chosen are all that is needed.
    softmax = score == "softmax" and renormalise and bias_E is None and (group_score == "max" or top_groups == groups)
    graph = wide_TE.requires_grad and torch.is_grad_enabled()
    value_TE = wide_TE
    if graph or not softmax:
        value_TE = wide_TE.softmax(-1) if score == "softmax" else wide_TE.sigmoid()
    index_TK, weight_TK = loops.choose(
        value_TE, softmax and not graph, top_k, bias_E, groups, top_groups, group_score, renormalise, scale
    )
    return index_TK, reference.weigh(value_TE, index_TK, renormalise, scale) if graph else weight_TK


def top(values: Tensor, top_k: int) -> Tensor:
    """Where the K largest along the last dimension are, int64 [..., K]: the largest first, the lower first of equals.

    Where there is a NaN, the places are in range, no two the same, and of no other meaning. torch.topk orders equals as
    it likes.
    """
    loops = _loops(values) if values.dtype in (torch.float32, torch.float64) else None
    if loops is None:
        return values.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    flat: Tensor = loops.top(values.reshape(-1, values.shape[-1]), min(top_k, values.shape[-1]))
    return flat.view(*values.shape[:-1], flat.shape[1])


def _loops(values: Tensor) -> Any:
    """The compiled loops of a CPU, if they can have these values; torch.compile cannot see into them."""
    return _compiled() if values.is_cpu and not torch.compiler.is_compiling() else None


@cache
def _compiled() -> Any:
    """None where numba is not installed, and where Triton's interpreter has the CPU."""
    if target.interpreting() or find_spec("numba") is None:
        return None
    from moe_kernels.cpu import router

    return router


def _forward(
    logits_TE: Tensor,
    selection_bias_E: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from moe_kernels.gpu import router

    index, weight = router.forward(
        logits_TE, selection_bias_E, top_k, score, groups, top_groups, group_score, renormalise, scale
    )
    return weight, index


def _backward(
    dweight_TK: Tensor, logits_TE: Tensor, index_TK: Tensor, score: str, renormalise: bool, scale: float
) -> Tensor:
    from moe_kernels.gpu import router

    return router.backward(dweight_TK, logits_TE, index_TK, score, renormalise, scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, score, _, _, _, renormalise, scale = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.said = score, renormalise, scale


def _gradients(ctx: Any, dweight_TK: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (_backward_operator(dweight_TK.contiguous(), *ctx.saved_tensors, *ctx.said), *(None,) * 8)


_operator = torch.library.custom_op("moe_kernels::route", _forward, mutates_args=())
_operator.register_autograd(_gradients, setup_context=_keep)
_backward_operator = torch.library.custom_op("moe_kernels::route_backward", _backward, mutates_args=())


@_operator.register_fake
def _(logits_TE: Tensor, selection_bias_E: Tensor | None, top_k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int64)


@_backward_operator.register_fake
def _(dweight_TK: Tensor, logits_TE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
