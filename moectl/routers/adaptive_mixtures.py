"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan, Hinton, Neural Computation 1991): a soft gate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide
from moectl.routers.ranking import ranked


@dataclass(frozen=True, slots=True)
class AdaptiveMixturesOptions(Options):
    """None that matter.

    Attributes:
        top_k: of no effect: every expert works on every token.
    """

    top_k: int = 1


class AdaptiveMixtures(Router):
    """y = sum_i p_i o_i with p = softmax of a linear gate; nothing is left out, and no loss balances.

    In the paper (eq. 1.2 and 1.3; numbers from memory) one expert is drawn with probability p_i, the error of which is
    `mixture_loss`, and the mixture's mean is what is predicted. A tanh network may stand in for the linear gate.

    Implementations: layers of today backpropagate through the mean, the error of which is the paper's eq. 1.1, and not
    through the loss of a draw: so does LibMTL's `MMoE`, whose gate reads the input and has a bias, which ours has not.
    Both are here: the mean is the router, the paper's loss is `mixture_loss`.
    """

    Options = AdaptiveMixturesOptions

    @property
    def active(self) -> float:
        """All."""
        return float(self.num_experts)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """All experts over their probability."""
        return routing(*ranked(wide(scores_TE).softmax(-1)))


def mixture_loss(logits_TE: Tensor, squared_error_TE: Tensor) -> Tensor:
    """-log sum_i p_i exp(-||d - o_i||^2 / 2) (eq. 1.3), the mean over tokens: experts compete to explain the target.

    Its gradient to an expert's output is that of its own squared error, over the probability, *given* the target, that
    it was the one: unlike the error of the mean it does not ask experts to cancel the others' residuals.

    Args:
        logits_TE: of the gate.
        squared_error_TE: ||d - o_i||^2 of each token and expert.
    """
    return -(wide(logits_TE).log_softmax(-1) - wide(squared_error_TE) / 2).logsumexp(-1).mean()
