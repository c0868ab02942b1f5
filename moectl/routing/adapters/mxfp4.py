"""gpt-oss in MXFP4: the block hands its logits to a kernel, and calls neither its router nor its experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moectl.routing.tap import Choice, Tap, beside, new_point


def tap(model: nn.Module, name: str) -> Tap:
    """The choice, made again from the logits that the block returns beside its output."""
    block, router = beside(model, name)
    top_k: int = router.top_k  # type: ignore[union-attr, assignment]
    point = new_point(name, int(model.get_submodule(name).num_experts), score_kind="logits")  # type: ignore[arg-type]

    def scores(output: Any) -> Tensor:
        return output[1].flatten(0, -2)

    def chosen(output: Any) -> Choice:
        top_TK, index_TK = scores(output).topk(top_k, dim=-1)
        return index_TK, top_TK.softmax(-1)

    return Tap(point, None, block, chosen, scores, ordered=True)
