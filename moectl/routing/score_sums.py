"""The sums of `moectl.traces.statistics.Scored`, formed on the device that the scores are on, without waiting for it.

Legend: T tokens, E experts, M bins of margins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.traces.statistics import MARGIN_EDGES, Scored
from moectl.traces.trace import Point


class ScoreSums:
    """Running sums over the tokens of one point."""

    def __init__(self, point: Point, device: torch.device) -> None:
        self._point = point
        self._tokens = 0
        self._sum = torch.zeros(point.num_experts + 2, dtype=torch.float64, device=device)
        self._margin_M = torch.zeros(len(MARGIN_EDGES) - 1, dtype=torch.int64, device=device)
        self._edges = torch.tensor(MARGIN_EDGES[1:-1], dtype=torch.float32, device=device)

    def add(self, score_TE: Tensor, top_TK: Tensor | None = None) -> Tensor:
        """Count some tokens; returns a number that is finite if all of their scores are.

        `top_TK` are the experts with the highest scores, where they are known: a top-k costs as much as all the rest.
        """
        point, score_TE = self._point, score_TE.float()
        p_TE, z_T, entropy_T = self._distribution(score_TE)
        if point.top_k < point.num_experts:
            if top_TK is None:
                top_TK = p_TE.topk(point.top_k, dim=-1).indices
            margin_T = p_TE.gather(-1, top_TK).amin(-1) - p_TE.scatter(-1, top_TK, -1.0).amax(-1)
            bin_T = torch.bucketize(margin_T, self._edges, right=True)
            self._margin_M.index_add_(0, bin_T, torch.ones_like(bin_T))
        self._sum += torch.cat([p_TE.sum(0), entropy_T.sum()[None], z_T.square().sum()[None]])
        self._tokens += len(score_TE)
        return score_TE.sum()

    def _distribution(self, score_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, the logsumexp of logits (else zeros), and entropies in nats."""
        if self._point.score_kind != "logits":
            p_TE, z_T = score_TE, score_TE.new_zeros(len(score_TE))
        else:
            log_p_TE = score_TE.log_softmax(-1)
            z_T = score_TE[:, 0] - log_p_TE[:, 0]
            if self._point.scoring == "softmax":
                p_TE = log_p_TE.exp()
                return p_TE, z_T, -(p_TE * log_p_TE).sum(-1)
            p_TE = score_TE.sigmoid()
        p_TE = p_TE / p_TE.sum(-1, keepdim=True).clamp(min=1e-30)
        return p_TE, z_T, torch.special.entr(p_TE).sum(-1)

    def total(self) -> Scored:
        """The sums so far."""
        *probability, entropy, z = self._sum.tolist()
        return Scored(
            self._tokens,
            torch.tensor(probability, dtype=torch.float64).numpy(),
            entropy,
            z if self._point.score_kind == "logits" else float("nan"),
            self._margin_M.cpu().numpy(),
        )
