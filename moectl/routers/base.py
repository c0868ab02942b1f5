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
    """Training maximises sum_t h_t . w_{e_t} with T/E tokens per expert (section 3.2.1, eq. 2); in use e_t = argmax
    h_t . w_e, since a balanced choice looks at later tokens (section 3.2.2).

    y = h + sigmoid(h . w_e) * f_e(h) (section 3.1, eq. 1), where f_e is what the expert adds to its residual.

    Implementations: the paper calls f_e a stack of residual layers, by which eq. 1 would add h twice; fairseq, by the
    same authors, writes alpha * (h + f) + (1 - alpha) * h, which is what is here. Its auction raises bids by 1/50 of
    the scores' range, and takes a worse, quicker way out after 100 rounds; the assignment here is the best. It gives
    each expert floor(T/E) tokens, and needs E to divide T; here none takes more than ceil(T/E). It can shuffle tokens
    between machines before they are assigned: whoever makes the batch does that here. Hetu's `BalanceAssignmentGate` is
    the same, with centroids that are not trained.
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
