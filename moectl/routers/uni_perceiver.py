"""Conditional MoE of Uni-Perceiver-MoE (arXiv 2206.04674): routed by attributes of task and modality, not by tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.labels import labelled, means
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class UniPerceiverOptions(Options):
    """Section 3.2 and the released configurations.

    Attributes:
        tasks: how many there are.
        modalities: how many there are.
        attributes: one row of bits for each pair, `10011000/01010100/...`, those of task 0 first, all its modalities in
            turn; empty: a bit for each task and a bit for each modality. The release has eight bits: image and text in
            the input, in the target, and in the token itself, whether it is a target, whether attention is causal.
        noise: in training scores are moved by N(0, noise / E).
        normalize: whether the weights of two experts or more add up to 1.
    """

    tasks: int = 16
    modalities: int = 2
    attributes: str = ""
    noise: float = 1.0
    normalize: bool = True


class UniPerceiver(Router):
    """Top-2 of softmax(W_g LayerNorm(W_a a)), with a the attributes of the token's task and modality (section 3.2).

    All tokens of one task and modality go the same way, so that few experts need be in memory. As in `TaskLevel`,
    scores that come from elsewhere are averaged over the tokens of a task and modality.

    Implementations: one is known, the authors' fundamentalvision/Uni-Perceiver (`task_moe/gate.py`), and ours equals
    its `top2gating` under the noise policy `vmoe`: weights in training are of the noisy scores, and its balancing loss
    is commented out. Its other policies, Gumbel noise on the choice alone and jitter on the input, a GELU before the
    LayerNorm and a priority by probability are left out.
    """

    Options = UniPerceiverOptions
    attribute_GA: Tensor

    def make_gate(self, hidden_size: int) -> None:
        """The map of attributes, its normalisation, and the gate."""
        super().make_gate(hidden_size)
        bit_GA = _attributes(self.options)
        self.register_buffer("attribute_GA", bit_GA)
        self.embed = nn.Sequential(nn.Linear(bit_GA.shape[1], hidden_size), nn.LayerNorm(hidden_size))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the attributes [T, E], whatever the hidden states."""
        embedded_GD = self.embed(self.attribute_GA)
        return nn.functional.linear(wide(embedded_GD), wide(self.weight))[self._pair(context)]

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice that all tokens of a task and modality share."""
        options, label_T = self.options, self._pair(context)
        scores_TE = means(wide(scores_TE), label_T)
        if context.training and options.noise:
            shape = (options.tasks * options.modalities, self.num_experts)
            noise_GE = torch.empty(shape, dtype=scores_TE.dtype, device=scores_TE.device)
            noise_GE.normal_(std=options.noise / self.num_experts, generator=context.generator)
            scores_TE = scores_TE + noise_GE[label_T]
        index_TK = top(scores_TE, options.top_k)
        weight_TK = scores_TE.softmax(-1).gather(1, index_TK)
        if options.normalize and options.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return routing(index_TK, weight_TK)

    def _pair(self, context: Context) -> Tensor:
        options = self.options
        task_T = labelled(context.task_T, options.tasks, "task")
        return task_T * options.modalities + labelled(context.modality_T, options.modalities, "modality")


def _attributes(options: UniPerceiverOptions) -> Tensor:
    """The bits of each pair of task and modality, float32 [G, A]."""
    tasks, modalities = options.tasks, options.modalities
    if not options.attributes:
        task_GZ = torch.eye(tasks).repeat_interleave(modalities, 0)
        return torch.cat([task_GZ, torch.eye(modalities).repeat(tasks, 1)], 1)
    given = options.attributes.split("/")
    if len(given) != tasks * modalities or len({len(bits) for bits in given}) != 1 or set("".join(given)) - set("01"):
        raise ValueError(f"attributes must be {tasks * modalities} rows of as many bits, separated by '/'")
    return torch.tensor([[float(bit) for bit in bits] for bits in given])
