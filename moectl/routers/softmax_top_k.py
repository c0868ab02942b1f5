"""The plain ones of today's decoders: the k best logits, and weights from a softmax or sigmoid of them. No capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing, z_loss
from moectl.routers.noise import jittered
from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide


@dataclass(frozen=True, slots=True)
class MixtralOptions(Options):
    """The values of the released model.

    Attributes:
        normalize: whether a token's weights add up to 1.
        jitter: training multiplies what the gate is given by U(1 - jitter, 1 + jitter).
        aux_loss: coefficient of the balancing loss, which is 1 at balance (k times that in transformers).
        z_loss: coefficient of the mean squared log-sum-exp.
        global_batch: whether the load in the balancing loss is that of all processes (arXiv 2501.11873).
    """

    normalize: bool = True
    jitter: float = 0.0
    aux_loss: float = 0.02
    z_loss: float = 0.0
    global_batch: bool = False


class Mixtral(Router):
    """softmax(TopK(x W)): the softmax over all, the k best of it, divided by their sum (arXiv 2401.04088, section 2.1).

    The paper takes the softmax of the chosen logits, the released code divides: the same numbers.
    """

    Options = MixtralOptions
    weighed_by: ClassVar[str] = "softmax"

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options, loss = self.options, None
        index_TK, weight_TK = choose(scores_TE, options.top_k, score=self.weighed_by, normalize=options.normalize)
        if context.training:
            probability_TE = wide(scores_TE).softmax(-1)
            loss = options.aux_loss * load_balancing(probability_TE, index_TK, options.global_batch)
            loss = loss + options.z_loss * z_loss(scores_TE) if options.z_loss else loss
        return routing(index_TK, weight_TK, None, loss)


@dataclass(frozen=True, slots=True)
class OlmoeOptions(MixtralOptions):
    """As Mixtral's, with the values of arXiv 2409.02060."""

    top_k: int = 8
    normalize: bool = False
    aux_loss: float = 0.01
    z_loss: float = 0.001


class Olmoe(Mixtral):
    """The k best probabilities as they are, which add up to less than 1 (arXiv 2409.02060, section 2).

    Qwen3-MoE is this with `normalize`.
    """

    Options = OlmoeOptions


@dataclass(frozen=True, slots=True)
class GptOssOptions(MixtralOptions):
    """As Mixtral's, with the values of transformers."""

    top_k: int = 4
    aux_loss: float = 0.001


class GptOss(Mixtral):
    """softmax of the k best logits, which is Mixtral's, of a gate with a bias (without it Granite MoE, JetMoe)."""

    Options = GptOssOptions

    def make_gate(self, hidden_size: int) -> None:
        """A linear gate with a bias."""
        super().make_gate(hidden_size)
        self.bias = nn.Parameter(torch.zeros(self.num_experts))

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits [T, E]."""
        return super().score(hidden_TD, context) + wide(self.bias)


@dataclass(frozen=True, slots=True)
class Llama4Options(MixtralOptions):
    """As Mixtral's, with the values of transformers."""

    top_k: int = 1
    normalize: bool = False
    aux_loss: float = 0.001


class Llama4(Mixtral):
    """sigmoid of the k best logits. Llama 4 multiplies an expert's *input* with it, and not its output."""

    Options = Llama4Options
    weighed_by = "sigmoid"
