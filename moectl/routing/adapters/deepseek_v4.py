"""DeepSeek-V4: its first MoE layers look experts up by token id, the others score with the root of a softplus."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moectl.routing.tap import Tap, beside, dispatch_tap


def tap(model: nn.Module, name: str) -> Tap:
    """Scores as the router's own function makes them of its logits, divided by their sum; none where a table decides.

    The function (`scoring_func`) is neither softmax nor sigmoid, so the logits alone would be misread.
    """
    found = dispatch_tap(model, name)
    router: Any = beside(model, name)[1]
    if hasattr(router, "tid2eid"):
        return replace(found, point=replace(found.point, score_kind="none", selects=False), scores=None)

    def scores(output: Any) -> Tensor:
        score_TE = router.score_fn(output[0].float())
        return score_TE / score_TE.sum(-1, keepdim=True)

    return replace(found, point=replace(found.point, score_kind="probabilities"), scores=scores)
