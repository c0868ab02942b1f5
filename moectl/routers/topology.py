"""FasterMoE's topology-aware gate (PPoPP 2022): only a small share of a node's tokens may leave it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.routers import expert_groups
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Options, Router, Routing, routing, top, wide


@dataclass(frozen=True, slots=True)
class TopologyOptions(Options):
    """The values of fastmoe.

    Attributes:
        groups: nodes: consecutive experts, and consecutive tokens, are on one.
        outgoing: share of a node's tokens whose first choice may be on another node.
        aux_loss: coefficient of the balancing loss; fastmoe leaves it to its user.
    """

    groups: int = 2
    outgoing: float = 0.14
    aux_loss: float = 0.01


class Topology(Router):
    """The top k of the logits and a softmax of them, if fewer than `outgoing` of a node's tokens would leave it with
    their first choice. Else all take the k best experts of their own node, and those with the largest first choices
    elsewhere take that one in place of their last (section 4.3, number from memory).

    Implementations: one is known, the authors' laekov/fastmoe (`faster_gate.py`), whose choice is ours; there k is 2,
    and a node is `FMOE_TOPO_GPUS_PER_NODE` workers. Its loss counts the experts of one worker for all experts; here it
    is GShard's over all of them. Experts whose copy is on the node (shadowed ones) count as of the node there; here
    none is.
    """

    Options = TopologyOptions

    def __init__(self, hidden_size: int | None, num_experts: int, options: TopologyOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        expert_groups.check(num_experts, self.options.groups, 1, self.options.top_k)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The choice, and in training the loss."""
        options, z_TE = self.options, wide(scores_TE)
        free_TK = top(z_TE, options.top_k)
        index_TK = free_TK.clone()
        node_T = torch.arange(len(z_TE), device=z_TE.device) * options.groups // max(len(z_TE), 1)
        node_E = torch.arange(self.num_experts, device=z_TE.device) // (self.num_experts // options.groups)
        leaves_T = node_E[free_TK[:, 0]] != node_T
        at_home_TK = top(z_TE.detach().masked_fill(node_E != node_T[:, None], -math.inf), options.top_k)
        for node in range(options.groups):
            here_N = (node_T == node).nonzero()[:, 0]
            may_leave = int(len(here_N) * options.outgoing)
            if leaves_T[here_N].sum() < may_leave:
                continue
            first_N = z_TE.detach()[here_N].amax(1).masked_fill(~leaves_T[here_N], -math.inf)
            out_N = here_N[first_N.argsort(descending=True, stable=True)[:may_leave]]
            index_TK[here_N] = at_home_TK[here_N]
            index_TK[out_N, -1] = free_TK[out_N, 0]
        loss = options.aux_loss * load_balancing(z_TE.softmax(-1), free_TK[:, :1]) if context.training else None
        return routing(index_TK, z_TE.gather(1, index_TK).softmax(-1), None, loss)
