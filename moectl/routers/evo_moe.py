"""EvoMoE (arXiv 2112.14397): the dense-to-sparse gate, which begins with all experts and ends with one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moectl.routers.choice import choose
from moectl.routers.losses import token_load_balancing
from moectl.routers.noise import gumbel_like
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide
from moectl.routers.ranking import ranked


@dataclass(frozen=True, slots=True)
class EvoMoeOptions(Options):
    """Temperatures and the balancing coefficient are from memory; the rest is the released code's.

    Attributes:
        top_k: experts per token in use.
        temperature: of the Gumbel-softmax when training begins.
        final_temperature: when it ends.
        threshold: experts of a smaller share are left out.
        gumbel: whether weights are the Gumbel-softmax itself, or the plain softmax of the experts that it chose.
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    temperature: float = 2.0
    final_temperature: float = 0.3
    threshold: float = 1e-3
    gumbel: bool = True
    aux_loss: float = 0.01


class EvoMoe(Router):
    """Training: g = softmax((z + Gumbel noise) / temperature), where it is over the threshold, as it is; use: top of z.

    The colder the softmax, the fewer experts are over the threshold. Between its two ends the temperature falls by
    equal factors (`Context.progress`). The balancing loss is E * sum_e mean(weight_e) * (share of tokens with e among
    theirs). The expert-diversify phase (one expert, copied, with masks) is not routing. The dense-to-sparse gate is the
    paper's section 3.3 (number from memory).

    Implementations: one is known, the authors' codecaution/EvoMoE, in two revisions. The earlier has a threshold of
    0.02, no balancing loss and weights of the Gumbel-softmax; the later, which is followed, 0.001, the loss, and
    weights of either softmax: `gumbel`. Its trainer sets the temperature; at 0 all experts work, by the plain softmax.
    Both can draw one expert in place of all over the threshold, which is not here. In use there is room for all tokens,
    as here.
    """

    Options = EvoMoeOptions

    def temperature(self, progress: float) -> float:
        """Of the Gumbel-softmax, when that share of the training is done."""
        first, last = self.options.temperature, self.options.final_temperature
        return float(first * (last / first) ** progress)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """Many experts in training, few in use."""
        options, scores_TE = self.options, wide(scores_TE)
        if not context.training:
            return routing(*choose(scores_TE, options.top_k))
        noisy_TE = scores_TE + gumbel_like(scores_TE, context.generator)
        soft_TE = (noisy_TE / self.temperature(context.progress)).softmax(-1)
        gate_TE = (soft_TE > options.threshold) * (soft_TE if options.gumbel else scores_TE.softmax(-1))
        index_TE, weight_TE = ranked(gate_TE)
        return routing(index_TE, weight_TE, aux_loss=options.aux_loss * token_load_balancing(gate_TE, index_TE))
