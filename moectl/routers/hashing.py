"""Hash layers: the token's id names its experts (arXiv 2106.04426, 2311.10768; DeepSeek-V4).

Legend: T tokens, K choices, V ids, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import ClassVar

import torch
from torch import Tensor

from moectl.routers.protocol import NO_EXPERT, Context, Options, Router, Routing, routing, top, wide

FEATURES = ("token", "previous", "bigram", "position")


@dataclass(frozen=True, slots=True)
class HashOptions(Options):
    """Section 3.

    Attributes:
        of: what is hashed: `token`, `previous` (the token before), `bigram` (both), `position` (in the sequence).
        seed: of the hash function.
        vocab_size: ids in a table, `table_VK`, that may be replaced (`balanced_table`); 0: hashed without one.
    """

    top_k: int = 1
    of: str = "token"
    seed: int = 0
    vocab_size: int = 0


class Hash(Router):
    """e = hash(token), weight 1, nothing to learn; the paper's random hash. K > 1 draws K experts, maybe one twice.

    Of section 3 ("hash functions"; number from memory): `balanced_table` and `dispersed_table` are its other tables, to
    be written into `table_VK`, as are clusters of embeddings.

    Implementations: ParlAI, by the paper's authors, draws one table with Python's generator, seed 42, and leaves other
    hash functions to its reader; here the id itself is scrambled (splitmix64), so that no vocabulary is needed. Its
    experts hold the residual and the layer norm. Hetu's `HashGate` is given the experts, and a capacity.
    """

    Options: ClassVar[type[Options]] = HashOptions
    table_VK: Tensor

    def __init__(self, hidden_size: int | None, num_experts: int, options: HashOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.of not in FEATURES:
            raise ValueError(f"of is {self.options.of!r}, none of {', '.join(FEATURES)}")
        if self.options.vocab_size:
            if self.options.of != "token":
                raise ValueError(f"of is {self.options.of}, and a table with a vocab_size is of tokens")
            self.register_buffer("table_VK", self.experts(torch.arange(self.options.vocab_size)))

    def make_gate(self, hidden_size: int) -> None:
        """None."""

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Zeros: nothing is read from hidden states."""
        return wide(hidden_TD).new_zeros(len(hidden_TD), self.num_experts)

    def experts(self, id_T: Tensor) -> Tensor:
        """Those of ids [T, K]."""
        options = self.options
        return torch.stack([scrambled(id_T, options.seed + k) % self.num_experts for k in range(options.top_k)], 1)

    def chosen(self, context: Context) -> Tensor:
        """The experts of the context's tokens [T, K]."""
        if context.token_T is None:
            raise ValueError(f"{type(self).__name__} chooses by token ids, and the context has none")
        if self.options.vocab_size:
            return self.table_VK[context.token_T]
        return self.experts(feature(self.options.of, context.token_T, context.sequence_T))

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice."""
        index_TK = self.chosen(context)
        return routing(index_TK, wide(scores_TE).new_ones(index_TK.shape))


@dataclass(frozen=True, slots=True)
class MultiHashOptions(HashOptions):
    """As `HashOptions`, of two hash functions."""

    top_k: int = 2


class MultiHash(Hash):
    """K hash functions k_m = hash_m(x): the m-th gives the m-th of K slices of each weight matrix (section 3.3; number
    from memory).

    v = relu([A1_{k1}(x), .., AK_{kK}(x)]), y = [B1_{k1}(v), .., BK_{kK}(v)]: an expert's number stands for its K
    slices, and column m of the routing says whose m-th is taken. How a matrix is sliced is the layer's business.

    Implementations: none is public.

    Unverified: that each of the functions selects the parameters of one segment, and that the segments are then
    concatenated, is as notes on the paper quote it; v and y are from memory.
    """

    Options = MultiHashOptions


@dataclass(frozen=True, slots=True)
class MoweOptions(HashOptions):
    """As `HashOptions`; `of` and `seed` say nothing.

    Attributes:
        unrouted: how many of the most frequent words, mostly punctuation, go to no expert.
    """

    unrouted: int = 16


class Mowe(Hash):
    """e = id mod E, where ids are numbers in a routing vocabulary of words sorted by frequency (arXiv 2311.10768).

    A token goes to one expert, by its id in the routing vocabulary at that position, as the caption of the paper's
    figure 2 says. The routing function is fixed; which one it is we could not read. This one gives an expert of its
    own to each word where there are as many, and else parts neighbours in frequency, so that no expert has several of
    the most frequent words. The paper's buckets by frequency and blocks of experts are about where experts are kept.
    The context's tokens are to be numbers in the routing vocabulary (a million words, by another tokenizer), not the
    model's.

    Implementations: none is public.

    Unverified: of the paper no more was at hand than its abstract and others' summaries.
    """

    Options = MoweOptions

    def experts(self, id_T: Tensor) -> Tensor:
        """Those of ids [T, 1]."""
        return torch.where(id_T < self.options.unrouted, NO_EXPERT, id_T % self.num_experts)[:, None]


@dataclass(frozen=True, slots=True)
class DeepSeekV4HashOptions(HashOptions):
    """The configuration's.

    Attributes:
        scale: of the weights, which sum to it.
    """

    top_k: int = 6
    scale: float = 1.5


class DeepSeekV4Hash(Hash):
    """The first layers of DeepSeek-V4: a table says which experts, a learned gate how much of each.

    w = s / sum(s) * scale over the chosen, s = sqrt(softplus(z)). The table is the checkpoint's `tid2eid`; without one
    a token's experts are those whose numbers hash highest with it. No paper was at hand, only the code of transformers
    (`DeepseekV4HashRouter`, after section 2.1 of the report).

    Implementations: transformers, SGLang, Megatron-LM and ports of the official code look the experts up, and weigh
    them as here; transformers and this add 1e-20 to the sum. Without a checkpoint Megatron-LM warns, and gives a token
    the experts (id + k) mod E, its neighbours the same but one; transformers leaves zeros.
    """

    Options = DeepSeekV4HashOptions
    make_gate, score = Router.make_gate, Router.score

    def experts(self, id_T: Tensor) -> Tensor:
        """Those of ids, all different [T, K]."""
        pair_TE = id_T[:, None] * self.num_experts + torch.arange(self.num_experts, device=id_T.device)
        return top(scrambled(pair_TE, self.options.seed), self.options.top_k)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice and its weights; there is no loss."""
        index_TK = self.chosen(context)
        softplus_TK = torch.nn.functional.softplus(wide(scores_TE).gather(1, index_TK))
        share_TK = softplus_TK.clamp(min=torch.finfo(softplus_TK.dtype).tiny).sqrt()  # of 0 it has no gradient
        return routing(index_TK, share_TK / (share_TK.sum(-1, keepdim=True) + 1e-20) * self.options.scale)


def feature(of: str, token_T: Tensor, sequence_T: Tensor | None) -> Tensor:
    """What is hashed, one number for each token; the token before a sequence's first one is -1."""
    if of == "token":
        return token_T
    place_T = torch.arange(len(token_T), device=token_T.device)
    if sequence_T is not None:
        place_T = place_T - torch.searchsorted(sequence_T.contiguous(), sequence_T)
    if of == "position":
        return place_T
    previous_T = torch.where(place_T == 0, -1, token_T.roll(1))
    return previous_T if of == "previous" else scrambled(previous_T, 0) + token_T


def scrambled(id_T: Tensor, seed: int) -> Tensor:
    """The splitmix64 generator's number after `id` steps from `seed`, without its sign bit; int64, any shape."""
    number_T = seed + (id_T.long() + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, modulo 2**64 throughout
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        number_T = (number_T ^ ((number_T >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return number_T & (2**63 - 1)


def balanced_table(count_V: Sequence[int], num_experts: int) -> Tensor:
    """The paper's balanced assignment, int64 [V, 1]: from the most frequent id on, each to the emptiest expert."""
    load = [(0, expert) for expert in range(num_experts)]
    heapify(load)
    expert_V = torch.zeros(len(count_V), dtype=torch.int64)
    for number in sorted(range(len(count_V)), key=lambda number: (-count_V[number], number)):
        held, expert = load[0]
        expert_V[number] = expert
        heapreplace(load, (held + count_V[number], expert))
    return expert_V[:, None]


def dispersed_table(cluster_V: Tensor, num_experts: int) -> Tensor:
    """The paper's dispersed hash, int64 [V, 1]: ids of one cluster in turn to all experts. A table of clusters, its
    clustered hash, is the clusters' numbers themselves; it does worse than chance there, and this one as well as."""
    order_V = cluster_V.argsort(stable=True)
    sorted_V = cluster_V[order_V]
    turn_V = torch.arange(len(cluster_V), device=cluster_V.device) - torch.searchsorted(sorted_V, sorted_V)
    return torch.empty_like(order_V).scatter(0, order_V, turn_V % num_experts)[:, None]
