"""Top-p routing (arXiv 2403.07652): as many experts as it takes to gather a given probability."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from moectl.routers.losses import entropy, token_load_balancing
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class TopPOptions(Options):
    """The threshold is the released model's; both coefficients are from memory.

    Attributes:
        top_k: of no effect: as many experts as it takes.
        threshold: the probability to gather.
        aux_loss: coefficient of the balancing loss.
        entropy: coefficient of the entropy of a token's probabilities, without which it takes ever more experts.
    """

    top_k: int = 1
    threshold: float = 0.4
    aux_loss: float = 0.01
    entropy: float = 1e-4


class TopP(Router):
    """The most probable experts up to the one that carries the sum of p over the threshold, each over its own p
    (section 2, number from memory).

    Weights are not divided by their sum. The losses are E * sum_e mean(p_e) * (share of tokens that go to e), and the
    mean entropy of p; they are from memory.

    Implementations: one is known, the authors' ZhenweiAn/Dynamic_MoE (`modeling_moe.py`), for use alone, and the choice
    and the weights equal it. Its training code, with both losses, is not public there.
    """

    Options = TopPOptions

    @property
    def active(self) -> None:
        """As many as a token asks for."""
        return None

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options, logits_TE = self.options, wide(scores_TE)
        probability_TE = logits_TE.softmax(-1)
        order_TE = top(logits_TE, self.num_experts)
        weight_TE = probability_TE.gather(1, order_TE)
        gathered_TE = pad(weight_TE.cumsum(-1)[:, :-1], (1, 0))
        index_TE = order_TE.masked_fill(gathered_TE > options.threshold, NO_EXPERT)
        loss = None
        if context.training:
            balance = token_load_balancing(probability_TE, index_TE)
            loss = options.aux_loss * balance + options.entropy * entropy(probability_TE).mean()
        return routing(index_TE, weight_TE, aux_loss=loss)
