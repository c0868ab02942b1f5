"""NLLB-MoE: a mask of first choices and a weight for every expert; two experts a token, fewer over capacity."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, dispatch_tap
from moectl.traces.trace import NO_EXPERT


def tap(model: nn.Module, name: str) -> Tap:
    """What the router decided, which is not what runs.

    transformers (5.23) takes the 0 or 1 of the mask for an expert's number, so that experts 0 and 1 compute
    for all the others.
    """

    def chosen(_mask_TE: Tensor, weight_TE: Tensor) -> Choice:
        weight_TK, index_TK = weight_TE.topk(2, dim=-1)
        return index_TK.masked_fill(weight_TK == 0, NO_EXPERT), weight_TK

    return replace(
        dispatch_tap(model, name),
        chosen=chosen,
        scores=lambda output: output[2],
        warning="transformers runs its experts 0 and 1 in place of all others; what is shown is what the router chose",
    )
