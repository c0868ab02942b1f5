"""Llama 4: all experts run on all tokens, whose hidden states are multiplied by the routing weight, mostly zero."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, new_point


def tap(model: nn.Module, name: str) -> Tap:
    """The choice, from the router's (weights [T, E], logits [T, E])."""
    router: Any = model.get_submodule(name)
    point = new_point(name, router.num_experts, score_kind="logits", scoring="sigmoid")

    def chosen(output: tuple[Tensor, Tensor]) -> Choice:
        weight_TE, logits_TE = output
        index_TK = logits_TE.topk(router.top_k, dim=-1).indices
        return index_TK, weight_TE.gather(-1, index_TK)

    return Tap(point, None, router, chosen, lambda output: output[1], ordered=True)
