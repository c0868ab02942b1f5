"""The plain ones of today's decoders: the k best logits, and weights from a softmax or sigmoid of them. No capacity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.choice import choose
from moectl.routers.losses import load_balancing, z_loss
from moectl.routers.noise import jittered
from moectl.routers.protocol import Context, Options, Router, Routing, all_served, top, wide


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

    Implementations: mistral-inference takes the softmax of the k logits, transformers that of all, and divides: the
    same numbers, in float32. In training transformers' jitter multiplies what experts are given too, here the gate's
    input alone; and its balancing loss is one for the model, k E * sum f P of f and P averaged over layers, here one
    for each router, added up, without the k. megablocks divides by the p-norm of the weights: p = 1 is this, none is
    `normalize=False`.
    """

    Options = MixtralOptions

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Router logits of the jittered input [T, E]."""
        return super().score(jittered(hidden_TD, self.options.jitter, context), context)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the losses."""
        options, loss = self.options, None
        index_TK, weight_TK = self.chosen(scores_TE)
        if context.training:
            probability_TE = wide(scores_TE).softmax(-1)
            loss = options.aux_loss * load_balancing(probability_TE, index_TK, options.global_batch)
            loss = loss + options.z_loss * z_loss(scores_TE) if options.z_loss else loss
        return all_served(index_TK, weight_TK, loss)

    def chosen(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights [T, K]."""
        return choose(scores_TE, self.options.top_k, normalize=self.options.normalize)


@dataclass(frozen=True, slots=True)
class OlmoeOptions(MixtralOptions):
    """As Mixtral's, with the values of arXiv 2409.02060."""

    top_k: int = 8
    normalize: bool = False
    aux_loss: float = 0.01
    z_loss: float = 0.001


class Olmoe(Mixtral):
    """The k best probabilities as they are, which add up to less than 1 (arXiv 2409.02060, section 2). Qwen3-MoE is
    this with `normalize`.

    Implementations: transformers' classes of OLMoE and Qwen3-MoE are one and the same; their `norm_topk_prob` is our
    `normalize`, off by default, and on in Qwen3's releases (from memory). megablocks, on which OLMoE was trained (from
    memory), divides where `moe_normalize_expert_weights` is set. Balancing losses differ from ours as Mixtral's do.
    """

    Options = OlmoeOptions


@dataclass(frozen=True, slots=True)
class GptOssOptions(MixtralOptions):
    """As Mixtral's, with the values of transformers."""

    top_k: int = 4
    aux_loss: float = 0.001


class GptOss(Mixtral):
    """softmax of the k best logits, which is Mixtral's, of a gate with a bias (without it Granite MoE, JetMoe).

    There is no paper of it.

    Implementations: openai/gpt-oss (`torch/model.py`) and transformers agree; both take the softmax in the model's own
    type, here as in Granite MoE and JetMoe in float32. How it was trained is not public: losses are transformers'.
    """

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
    """sigmoid of the k best logits. Llama 4 multiplies an expert's *input* with it, and not its output.

    There is no paper of it.

    Implementations: meta-llama/llama-models (`moe.py`) and transformers give every expert all tokens, those of others
    times sigmoid(-inf) = 0, which is the same; the sigmoid is in the model's own type in the first, in float32 in the
    second and here. How it was trained is not public: the loss is Mixtral's.
    """

    Options = Llama4Options

    def chosen(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts by their logits, since sigmoids of 17 and more are all 1 in float32."""
        top_k = self.options.top_k
        index_TK = choose(scores_TE, 1, normalize=True)[0] if top_k == 1 else top(scores_TE, top_k)
        weight_TK = wide(scores_TE).gather(1, index_TK).sigmoid()
        return index_TK, weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20) if self.options.normalize else weight_TK
