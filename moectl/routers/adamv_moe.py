"""AdaMV-MoE (ICCV 2023): a router per task, and a number of experts per task that grows until it no longer helps.

Checked against google-research/google-research, `moe_mtl/router/router.py` and `moe_mtl/main/trainer_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers.labels import labelled, rows
from moectl.routers.losses import importance_and_load
from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, top, wide
from moectl.routers.task_level import MtTag


@dataclass(frozen=True, slots=True)
class AdaMvOptions(Options):
    """The released configuration; its losses are weighted as V-MoE's.

    Attributes:
        top_k: experts per token that each task begins with.
        most: experts per token that no task goes beyond.
        tasks: how many there are.
        noise: in training scores are moved by N(0, noise / E).
        aux_loss: coefficient of the mean of the importance and the load loss.
        patience: steps without a better validation loss after which a task gets one expert more.
    """

    top_k: int = 1
    most: int = 8
    tasks: int = 16
    noise: float = 1.0
    aux_loss: float = 0.01
    patience: int = 5000


class AdaMvMoe(Router):
    """Top-k_z of softmax(W_z h + noise) of the task z; weights are the probabilities themselves, not renormalised.

    The losses are V-MoE's (arXiv 2106.05974, appendix A.2), of each task apart, added up. `validated` moves k_z.

    Implementations: one is known, google-research `moe_mtl`, and ours equals it, its oddities included: one flag and
    one stop are shared by its two tasks, so by all tasks here; a task at its most experts is never given one less. It
    validates every 2000 steps, and counts its patience from step 40,000 on, so that nothing grows before: here whoever
    calls `validated` sees to that. Its two losses have a weight each; here both have half of `aux_loss`. The paper's
    section 3 (number from memory) is what it builds.
    """

    Options = AdaMvOptions
    make_gate, score = MtTag.make_gate, MtTag.score  # a gate per task
    top_k_Z: Tensor
    best_Z: Tensor
    best_step_Z: Tensor
    grown: Tensor
    settled: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: AdaMvOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        tasks = self.options.tasks
        self.register_buffer("top_k_Z", torch.full((tasks,), self.options.top_k))
        self.register_buffer("best_Z", torch.full((tasks,), torch.inf))
        self.register_buffer("best_step_Z", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("grown", torch.tensor(False))
        self.register_buffer("settled", torch.tensor(False))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice; NO_EXPERT after a task's own number of experts."""
        task_T = labelled(context.task_T, self.options.tasks, "task")
        clean_TE, spread = wide(scores_TE), self.options.noise / self.num_experts
        noisy_TE, loss = clean_TE, clean_TE.new_zeros(())
        if context.training and spread:
            noisy_TE = clean_TE + torch.empty_like(clean_TE).normal_(std=spread, generator=context.generator)
        if context.training:
            for task, row_R in rows(task_T, self.options.tasks):
                top_k = int(self.top_k_Z[task])
                loss = loss + importance_and_load(clean_TE[row_R], noisy_TE[row_R], top_k, spread)
        wanted_TK = torch.arange(int(self.top_k_Z.max()), device=task_T.device) < self.top_k_Z[task_T][:, None]
        index_TK = top(noisy_TE, wanted_TK.shape[1])
        weight_TK = noisy_TE.softmax(-1).gather(1, index_TK)
        return routing(torch.where(wanted_TK, index_TK, NO_EXPERT), weight_TK, aux_loss=self.options.aux_loss * loss)

    def validated(self, loss_Z: Sequence[float], step: int) -> None:
        """Give a task whose validation loss has stopped falling one expert more, or take the last one back.

        A task that is better than ever keeps what it has. One that has not been for longer than `patience` steps gets
        one more; if since the last such change no task got better, it loses one instead, and nothing moves again.
        """
        changed = False
        for task, loss in enumerate(loss_Z):
            if loss < self.best_Z[task]:
                self.best_Z[task], self.best_step_Z[task] = loss, step
                self.grown.fill_(False)
            elif step - self.best_step_Z[task] > self.options.patience and not self.settled:
                if self.top_k_Z[task] >= min(self.options.most, self.num_experts):
                    continue
                if self.grown:
                    self.top_k_Z[task] = max(1, int(self.top_k_Z[task]) - 1)
                    self.settled.fill_(True)
                else:
                    self.top_k_Z[task] += 1
                changed = True
        if changed:
            self.grown.fill_(True)
