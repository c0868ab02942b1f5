"""Routing by what a token belongs to: Task-MoE (arXiv 2110.03742) and MT-TaG (arXiv 2204.07689)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.choice import choose
from moectl.routers.labels import labelled, linear, means
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class TaskLevelOptions(Options):
    """Task-MoE.

    Attributes:
        tasks: how many there are (languages, domains).
        level: `task`: all tokens of a task go the same way; `sentence`: all tokens of a sequence do.
        normalize: whether a token's weights add up to 1.
        aux_loss: coefficient of the balancing loss.
    """

    tasks: int = 16
    level: str = "task"
    normalize: bool = True
    aux_loss: float = 0.01


class TaskLevel(Router):
    """GATE(task id) or, by sentence, GATE(mean of its tokens) (section 3.1), with GATE that of GShard: softmax, top-2.

    Both are linear here: W_g e, with e a learnt embedding of the task, and W_g times the mean.

    The gate of a mean is then the mean of gates: `route` takes the mean of the scores over the task or the sentence. Of
    its own gate, by task, all scores of a task are equal, and it is causal; captured scores of another model's tokens,
    and sentences, are averaged over tokens that come later, and are not. The paper found sentences much the worst, and
    tasks in the decoder alone the best.

    Implementations: none is public, as far as we could find; GShard's chance of the second expert and its room are left
    out.
    """

    Options = TaskLevelOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: TaskLevelOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.level not in ("task", "sentence"):
            raise ValueError(f"level is {self.options.level!r}, and can be 'task' or 'sentence'")

    def make_gate(self, hidden_size: int) -> None:
        """An embedding per task, and the gate over it."""
        super().make_gate(hidden_size)
        self.task_ZD = nn.Parameter(torch.randn(self.options.tasks, hidden_size))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E]: of the task, whatever the hidden states; by sentence, of each token."""
        if self.options.level == "sentence":
            return super().score(hidden_TD, context)
        task_T = labelled(context.task_T, self.options.tasks, "task")
        return nn.functional.linear(wide(self.task_ZD), wide(self.weight))[task_T]

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice that all tokens of a task, or of a sentence, share."""
        options, scores_TE = self.options, wide(scores_TE)
        if options.level == "task":
            label_T = labelled(context.task_T, options.tasks, "task")
        elif context.sequence_T is None:
            label_T = torch.zeros(len(scores_TE), dtype=torch.int64, device=scores_TE.device)
        else:
            label_T = context.sequence_T
        mean_TE = means(scores_TE, label_T)
        index_TK, weight_TK = choose(mean_TE, options.top_k, normalize=options.normalize)
        loss = options.aux_loss * load_balancing(mean_TE.softmax(-1), index_TK) if context.training else None
        return routing(index_TK, weight_TK, aux_loss=loss)


@dataclass(frozen=True, slots=True)
class MtTagOptions(Options):
    """MT-TaG.

    Attributes:
        tasks: how many there are; each has a gate.
        aux_loss: coefficient of the balancing loss.
    """

    top_k: int = 1
    tasks: int = 16
    aux_loss: float = 0.01


class MtTag(Router):
    """Top-k of softmax(W_z h), with a gate W_z of the task z that the token belongs to; tasks share all experts.

    Unverified: that gates look at the task was read in the abstract; the formula (section 3, number from memory) is
    from memory.

    Implementations: none is public; Papers with Code lists none.
    """

    Options = MtTagOptions

    def make_gate(self, hidden_size: int) -> None:
        """One linear gate per task."""
        shape = (self.options.tasks, self.num_experts, hidden_size)
        self.weight_ZED = nn.Parameter(torch.randn(shape) * hidden_size**-0.5)

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of each token's own gate [T, E]."""
        task_T = labelled(context.task_T, self.options.tasks, "task")
        return linear(wide(hidden_TD), wide(self.weight_ZED), task_T)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training one balancing loss over all tokens."""
        probability_TE = wide(scores_TE).softmax(-1)
        index_TK = top(scores_TE, self.options.top_k)
        loss = self.options.aux_loss * load_balancing(probability_TE, index_TK) if context.training else None
        return routing(index_TK, probability_TE.gather(1, index_TK), aux_loss=loss)
