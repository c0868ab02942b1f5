"""What every router is: scores and a context in, the experts of each token and their weights out.

    router = Switch(hidden_size=512, num_experts=8)
    routing = router(hidden_TD)                       # its own gate, then its rule
    routing = router.route(scores_TE, Context())      # the rule alone, on scores that were captured elsewhere

State that outlives a step (selection biases, thresholds) is in the module's buffers, and moves in `after_step` alone;
what calls count towards it is in buffers that `after_step` sets back to 0.
Legend: T tokens, D hidden, E experts, K choices, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_kernels import top as top

NO_EXPERT = -1
"""In place of an expert's number where a token goes nowhere: dropped over capacity, below a threshold, skipped."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a router may look at besides scores; most look at nothing.

    Attributes:
        training: whether noise, capacities of training and losses are on.
        hidden_TD: what the scores were computed from.
        token_T: token ids, int64.
        sequence_T: which sequence each token belongs to, int64, from 0, never falling, no number left out; None: all
            are one.
        task_T: the task, domain or language of each token, int64.
        modality_T: int64.
        generator: of everything that is drawn; None: torch's own.
        progress: which share of the training is done, for what is annealed; 1 in use.
    """

    training: bool = False
    hidden_TD: Tensor | None = None
    token_T: Tensor | None = None
    sequence_T: Tensor | None = None
    task_T: Tensor | None = None
    modality_T: Tensor | None = None
    generator: torch.Generator | None = None
    progress: float = 1.0


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each token goes.

    Attributes:
        index_TK: experts in the order of preference, int64; NO_EXPERT where there is none.
        weight_TK: what their outputs are multiplied with, 0 where there is none; with a graph where one is asked for.
        dropped_TK: True where the router wanted an expert that had no room left.
        aux_loss: a scalar to add to the model's loss, coefficients applied; 0 outside training, and of no tokens.
    """

    index_TK: Tensor
    weight_TK: Tensor
    dropped_TK: Tensor
    aux_loss: Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    """How tokens are mixed where experts take slots in place of tokens (Soft MoE): S slots, the first S/E expert 0's.

    Attributes:
        dispatch_TS: what each token gives to each slot.
        combine_TS: what each slot gives to each token.
        aux_loss: as in `Routing`.
    """

    dispatch_TS: Tensor
    combine_TS: Tensor
    aux_loss: Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """What every router takes; a router's own options are the fields of its `Options`, a subclass.

    Attributes:
        top_k: experts per token.
    """

    top_k: int = 2


class Router(nn.Module):
    """A gate and a rule. A subclass has `Options`, `route`, and `score` if its gate is not a plain linear one.

    Args:
        hidden_size: of what the gate is given; None: no gate, for scores that come from elsewhere.
        num_experts: routed experts.
        options: an `Options` of the class; its defaults are the paper's.

    Raises:
        ValueError: an option makes no sense for that many experts.
    """

    Options: ClassVar[type[Options]] = Options

    def __init__(self, hidden_size: int | None, num_experts: int, options: Any = None) -> None:
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.options: Any = self.Options() if options is None else options
        if not 1 <= self.options.top_k <= num_experts:
            raise ValueError(f"top_k is {self.options.top_k}, of {num_experts} experts")
        if (factor := getattr(self.options, "capacity_factor", 0)) < 0:
            raise ValueError(f"capacity_factor is {factor}, and 0 is no limit")
        if hidden_size is not None:
            self.make_gate(hidden_size)

    @property
    def active(self) -> float | None:
        """How many experts work on a token, on average and if none is dropped; None where the options do not say it."""
        return float(self.options.top_k)

    def make_gate(self, hidden_size: int) -> None:
        """Make the parameters that `score` needs."""
        self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E], float32 or wider."""
        return nn.functional.linear(wide(hidden_TD), wide(self.weight))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice."""
        raise NotImplementedError

    def forward(self, hidden_TD: Tensor, context: Context | None = None) -> Routing:
        """Score and choose; `hidden_TD` stands in the context too."""
        context = Context() if context is None else context
        context = replace(context, hidden_TD=hidden_TD)
        return self.route(self.score(hidden_TD, context), context)

    def after_step(self, load_E: Tensor) -> None:
        """Move what is moved without a gradient, given how many assignments each expert got in the step, everywhere."""


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that already: routers compute in nothing less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def routing(
    index_TK: Tensor, weight_TK: Tensor, kept_TK: Tensor | None = None, aux_loss: Tensor | None = None
) -> Routing:
    """A Routing of choices of which only `kept_TK` found room (None: all); NO_EXPERT in `index_TK` is no drop."""
    wanted_TK = index_TK != NO_EXPERT
    zero = weight_TK.new_zeros(())
    loss = zero if aux_loss is None or not len(index_TK) else aux_loss  # means over no tokens are NaN
    if kept_TK is None:
        return Routing(index_TK, torch.where(wanted_TK, weight_TK, zero), torch.zeros_like(wanted_TK), loss)
    return Routing(
        torch.where(kept_TK, index_TK, NO_EXPERT),
        torch.where(kept_TK & wanted_TK, weight_TK, zero),
        wanted_TK & ~kept_TK,
        loss,
    )


def all_served(index_TK: Tensor, weight_TK: Tensor, aux_loss: Tensor | None = None) -> Routing:
    """A Routing of choices that all are experts with room: `routing` of them, without looking."""
    loss = weight_TK.new_zeros(()) if aux_loss is None or not len(index_TK) else aux_loss
    return Routing(index_TK, weight_TK, torch.zeros_like(index_TK, dtype=torch.bool), loss)


def counts(index_TK: Tensor, num_experts: int) -> Tensor:
    """How many assignments each expert has, int64 [E]; NO_EXPERT is not counted."""
    flat = index_TK.flatten()
    return torch.bincount(flat[flat != NO_EXPERT], minlength=num_experts)
