"""ReMoE (arXiv 2412.14711): weights are a ReLU, and an adaptive L1 loss keeps as many experts as one wants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.losses import token_load_balancing
from moectl.routers.processes import summed
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide
from moectl.routers.ranking import ranked


@dataclass(frozen=True, slots=True)
class ReMoeOptions(Options):
    """Defaults of the released training.

    Attributes:
        top_k: experts per token, on average, that the loss steers to.
        aux_loss: coefficient of the loss when training begins.
        rate: what the coefficient is multiplied with, or divided by, after each step.
    """

    top_k: int = 1
    aux_loss: float = 1e-8
    rate: float = 1.2


class ReMoe(Router):
    """y = sum of relu(z_e) E_e(h), without a softmax; experts of weight 0 are not run (section 3, number from memory).

    The loss is c * sum_e f_e mean(relu(z_e)) with f_e = E / (k T) * (how many tokens e has): an L1 norm that weighs
    busy experts more, alike to Switch's loss without its normalised probabilities. After a step c grows by `rate` if
    more than k experts per token were run, and falls by it if fewer were: by the sign of `excess`, how many more than
    that the training calls since the last step took. It is counted here, since loads do not tell how many tokens there
    were; counted twice, as under gradient checkpointing, it has the same sign.

    Implementations: the authors' is a fork of Megatron-LM (`l1_reg_load_balancing`, read in copies), whose weights and
    loss ours has; it keeps one c for all layers, and here each router has its own. A port of it to BMTrain lets c fall
    no lower than it began. Fsoft-AIC/LibMoE (`remoe.py`) is another router: k experts at most, weights divided by their
    sum, the balancing loss of a softmax, and a coefficient that stays, since its update is commented out.
    """

    Options = ReMoeOptions
    coefficient: Tensor
    excess: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: ReMoeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.register_buffer("coefficient", torch.tensor(self.options.aux_loss))
        self.register_buffer("excess", torch.zeros((), dtype=torch.int64), persistent=False)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """All experts of a positive score."""
        gate_TE = wide(scores_TE).relu()
        index_TE, weight_TE = ranked(gate_TE)
        loss = None
        if context.training:
            self.excess += (gate_TE > 0).sum() - self.options.top_k * len(scores_TE)
            loss = self.coefficient * token_load_balancing(gate_TE, index_TE) / self.options.top_k
        return routing(index_TE, weight_TE, aux_loss=loss)

    def after_step(self, load_E: Tensor) -> None:
        """Move the coefficient by the number of experts per token that the step ran, on all processes."""
        self.coefficient *= self.options.rate ** summed(self.excess).sign()
        self.excess.zero_()
