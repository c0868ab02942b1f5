"""Doge: experts are the rows of an embedding, found by a product of two sets of keys (PEER, arXiv 2407.04153)."""

from __future__ import annotations

from typing import Any

from torch import nn

from moectl.routing.tap import Choice, Tap, new_point


def tap(model: nn.Module, name: str) -> Tap:
    """The choice, made again from the logits [2, T, keys] that the layer returns.

    An expert's score is the sum of two of them; for its thousands of experts they are not written out.
    """
    layer: Any = model.get_submodule(name)
    keys, top_k = layer.num_keys, layer.top_k

    def chosen(output: Any) -> Choice:
        (row_TS, column_TS), (at_row_TS, at_column_TS) = output[1].topk(keys, dim=-1)
        sum_TP = (row_TS[..., None] + column_TS[..., None, :]).flatten(-2)
        number_TP = (at_row_TS[..., None] * keys + at_column_TS[..., None, :]).flatten(-2)
        top_TK, place_TK = sum_TP.topk(top_k, dim=-1)
        weight_TK = top_TK.softmax(-1)
        if layer.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return number_TP.gather(-1, place_TK), weight_TK

    warning = "its router mixes the logits of different tokens of a batch, so a token's experts depend on the others"
    return Tap(new_point(name, layer.num_experts), None, layer, chosen, None, ordered=True, warning=warning)
