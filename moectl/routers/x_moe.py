"""Cosine gates: X-MoE (arXiv 2204.09179) and Tutel's (arXiv 2206.03382), which agree in the cosine and little else.

Legend: T tokens, D hidden, E experts, K choices, R size that hidden states are projected to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from moectl.routers.capacity import capacity, kept
from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class XMoeOptions(Options):
    """The softmax's temperature and the size are from memory; 0.07 is the authors' code's.

    Attributes:
        size: that hidden states are projected to; 0: half the number of experts.
        gate: `softmax` over all experts, or `sigmoid` of each.
        temperature: that cosines are divided by, when training begins; learnt. The paper starts at 0.3 for the softmax
            and 0.07 for the sigmoid.
        normalize: whether tokens are normalised as experts are; torchscale does not.
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    size: int = 0
    gate: str = "softmax"
    temperature: float = 0.3
    normalize: bool = True
    aux_loss: float = 0.01


class XMoe(Router):
    """s_e = cos(W h, e) / temperature; the expert of the largest, over softmax(s) or sigmoid(s) (section 3, number from
    memory).

    The balancing loss is Switch's, of the softmax of cosines over the temperature that training began with, so that
    learning the temperature does not move it.

    Implementations: the authors' fairseq gate, as xy980523/MoEc_model has it (`tmoe_routing_hard_cosine`), is the
    sigmoid one with the temperature learnt from 0.07, which stays 0.07 in the loss. Later microsoft/torchscale rescales
    each e to norm 1.5 in place, which a cosine does not see, does not normalise W h, and has no temperature
    (`normalize=False, temperature=1`, frozen); its size is 16 for any number of experts, its loss of the same scores,
    and experts have a capacity, as here none has.
    """

    Options = XMoeOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: XMoeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate is {self.options.gate!r}, neither softmax nor sigmoid")

    def make_gate(self, hidden_size: int) -> None:
        """An even projection and orthogonal experts."""
        size = self.options.size or max(1, self.num_experts // 2)
        self.projection = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(size, hidden_size), a=math.sqrt(5)))
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.num_experts, size), gain=0.32))
        self.temperature = nn.Parameter(torch.tensor([self.options.temperature]))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Cosines, before the temperature [T, E]."""
        low_TR = linear(wide(hidden_TD), wide(self.projection))
        low_TR = normalize(low_TR, dim=-1, eps=1e-4) if self.options.normalize else low_TR
        return linear(low_TR, normalize(wide(self.weight), dim=-1, eps=1e-4))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice from cosines."""
        options = self.options
        logits_TE = scores_TE / wide(self.temperature).clamp(min=1e-4)
        weight_TE = logits_TE.sigmoid() if options.gate == "sigmoid" else logits_TE.softmax(-1)
        index_TK = top(scores_TE, options.top_k)
        loss = None
        if context.training:
            loss = options.aux_loss * load_balancing((scores_TE / options.temperature).softmax(-1), index_TK)
        return routing(index_TK, weight_TE.gather(1, index_TK), aux_loss=loss)


@dataclass(frozen=True, slots=True)
class TutelCosineOptions(Options):
    """Defaults of the released code.

    Attributes:
        size: that hidden states are projected to.
        temperature: that cosines are divided by, when training begins; learnt, and kept over 0.01.
        capacity_factor: places per expert over tokens per expert, rounded as Tutel does; 0: no limit.
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    size: int = 256
    temperature: float = 0.5
    capacity_factor: float = 1.0
    aux_loss: float = 0.01


class TutelCosine(Router):
    """p = softmax(exp(min(a, log 100)) cos(W h + b, e)); the top k, over p / (sum of the k) where k > 1 (arXiv
    2206.03382, section 5.3, number from memory).

    The balancing loss is E * sum_e mean(p_e) * (share of *first* choices that are e), which the released examples weigh
    as they like.

    Implementations: one is known, microsoft/Tutel (`gates/cosine_top.py`, `impls/fast_dispatch.py`), and ours equals
    it, its rounding of room included. Its other ways with room are left out: without a factor as much as the fullest
    expert needs, alignment to a multiple, and tokens served by falling probability.
    """

    Options = TutelCosineOptions

    def make_gate(self, hidden_size: int) -> None:
        """torch's own init of a linear layer, and normal experts."""
        self.projection = nn.Linear(hidden_size, self.options.size)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.options.size).normal_(std=0.01))
        self.log_scale = nn.Parameter(torch.tensor([-math.log(self.options.temperature)]))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E]."""
        low_TR = linear(wide(hidden_TD), wide(self.projection.weight), wide(self.projection.bias))
        cosine_TE = linear(normalize(low_TR, dim=-1), normalize(wide(self.weight), dim=-1))
        return cosine_TE * wide(self.log_scale).clamp(max=math.log(100)).exp()

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice from logits."""
        options = self.options
        index_TK, weight_TK = choose(scores_TE, options.top_k, normalize=options.top_k > 1)
        room_TK = loss = None
        if options.capacity_factor:
            room = capacity(len(scores_TE), self.num_experts, options.top_k, options.capacity_factor, "tutel")
            room_TK = kept(index_TK, self.num_experts, room)
        if context.training:
            loss = options.aux_loss * load_balancing(wide(scores_TE).softmax(-1), index_TK[:, :1])
        return routing(index_TK, weight_TK, room_TK, loss)
