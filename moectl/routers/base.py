"""BASE layers (arXiv 2103.16716): a balanced assignment in training, each token's best expert in use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moectl.routers.assignment import balanced
from moectl.routers.protocol import Context, Options, Routing, routing, top, wide
from moectl.routers.single import Single


@dataclass(frozen=True, slots=True)
class BaseOptions(Options):
    """There are none besides: no loss, no noise, no capacity."""

    top_k: int = 1


class Base(Single):
    """Training maximises sum_t h_t . w_{e_t} with T/E tokens per expert (section 3.1); in use e_t = argmax h_t . w_e.

    The expert's share is sigmoid(h . w_e), the token's own the rest: y = h + sigmoid(h . w_e) * f_e(h), where f_e is
    what the expert adds to its residual (fairseq writes alpha * (h + f) + (1 - alpha) * h, which is the same).
    fairseq's auction stops within 1/50 of the scores' range of the best assignment; this one is the best. Where E does
    not divide T, no expert takes more than ceil(T/E). fairseq shuffles tokens between machines before they are
    assigned: whoever makes the batch does that here.
    """

    Options = BaseOptions

    def make_gate(self, hidden_size: int) -> None:
        """Orthogonal centroids of length 0.1."""
        super().make_gate(hidden_size)
        nn.init.orthogonal_(self.weight, gain=0.1)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The assignment, or the best."""
        scores_TE = wide(scores_TE)
        if context.training:
            index_T1 = balanced(scores_TE, -(-len(scores_TE) // self.num_experts))[:, None]
        else:
            index_T1 = top(scores_TE, 1)
        return routing(index_T1, scores_TE.gather(1, index_T1).sigmoid())
