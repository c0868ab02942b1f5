"""LongCat-Flash (arXiv 2509.01322): experts that return their input, so that easy tokens cost less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.choice import choose
from moectl.routers.protocol import Context, Options, Router, Routing, counts, routing, wide


@dataclass(frozen=True, slots=True)
class LongCatOptions(Options):
    """The values of the released model.

    Attributes:
        top_k: experts per token, those that compute nothing included.
        zero_experts: experts after the others that return their input.
        active: how many experts that compute a token is to have in the mean (K_e).
        scale: of the weights.
        bias_rate: step of the selection bias, times the missing share of all assignments (mu); the report gives none.
        groups: devices over which the loss spreads the experts that compute (D).
        aux_loss: coefficient of that loss (alpha); 0 leaves all to the bias. The report's value is not at hand.
    """

    top_k: int = 12
    zero_experts: int = 256
    active: float = 8.0
    scale: float = 6.0
    bias_rate: float = 0.001
    groups: int = 1
    aux_loss: float = 0.0


class LongCat(Router):
    """The K best of softmax(z) + b, weights 6 softmax(z) (eq. 1); experts from `num_experts` on return their input.

    After a step b_i += mu (K_e / (K N) - its share of all assignments) for experts that compute, 0 for the others (eq.
    2, section 2.1.1). With `aux_loss` training adds alpha * sum_j f_j P_j (eq. 3-5) over `groups` devices, each with an
    equal run of the experts that compute, and one more group of those that do not: P_j the probability of a group's
    experts together, the mean over tokens; f_j the choices of a token that are in the group over those that should be,
    K_e / groups and, of the last, K - K_e. Scores as wide as `num_experts` have no zero experts.

    Implementations: transformers' class has the choice and the weights, and ours equals it; ports of it have an option
    `norm_topk_prob` that divides the weights by their sum, which the release leaves off. No code of the bias step and
    of the loss is public: both are from notes on the report. The loss is printed with the indicator of a token that
    selects a group; here each choice counts, as it must for f_j to be 1 where K_e experts of a token compute.
    """

    Options = LongCatOptions
    bias: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: LongCatOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        options = self.options
        even = options.groups > 0 and num_experts % options.groups == 0
        if not even or (options.aux_loss and not 0 < options.active <= options.top_k):
            raise ValueError(f"groups is to divide {num_experts} experts, active to be in (0, top_k]: {options}")
        self.reach = num_experts + options.zero_experts
        self.register_buffer("bias", torch.zeros(self.reach))

    @property
    def active(self) -> float:
        """Those that compute, as many as the bias step aims at (K_e)."""
        options = self.options
        return float(min(options.active, options.top_k) if options.zero_experts else options.top_k)

    def make_gate(self, hidden_size: int) -> None:
        """A row for each expert, zero experts included."""
        rows = self.num_experts + self.options.zero_experts
        self.weight = nn.Parameter(hidden_size**-0.5 * torch.randn(rows, hidden_size))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, from scores of computing experts and zero experts after them."""
        options = self.options
        bias_E = self.bias[: scores_TE.shape[1]]
        index_TK, weight_TK = choose(scores_TE, options.top_k, bias_E=bias_E, scale=options.scale)
        loss = None
        if context.training and options.aux_loss:
            loss = options.aux_loss * self._over_devices(wide(scores_TE).softmax(-1), index_TK)
        return routing(index_TK, weight_TK, aux_loss=loss)

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move the bias of computing experts towards `active` of them per token."""
        options = self.options
        share_E = load_E.to(self.bias) / load_E.sum().clamp(min=1)
        wanted = options.active / options.top_k / self.num_experts
        self.bias[: self.num_experts] += options.bias_rate * (wanted - share_E[: self.num_experts])

    def _over_devices(self, probability_TE: Tensor, index_TK: Tensor) -> Tensor:
        options, N = self.options, self.num_experts
        mean_E = probability_TE.mean(0)
        chosen_E = counts(index_TK, len(mean_E)).to(mean_E) / len(index_TK)
        mean_G, chosen_G = (each_E[:N].view(options.groups, -1).sum(1) for each_E in (mean_E, chosen_E))
        loss = chosen_G @ mean_G * options.groups / options.active
        if options.top_k > options.active:  # else no choice should compute nothing, and the last f_j has no meaning
            loss = loss + chosen_E[N:].sum() * mean_E[N:].sum() / (options.top_k - options.active)
        return loss
