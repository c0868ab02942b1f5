"""PEER, a mixture of a million experts (arXiv 2407.04153): the top of N products of keys, found among 2 sqrt(N).

Legend: T tokens, D hidden, H heads, K choices of a head, A and B sub-keys of the two halves with A * B = E, R their
size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moectl.routers.protocol import Context, Options, Router, Routing, routing, wide

GATES = {"softmax": lambda score: score.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}


@dataclass(frozen=True, slots=True)
class PeerOptions(Options):
    """Defaults of lucidrains' code, which follows algorithm 1.

    Attributes:
        top_k: experts per head.
        heads: queries per token, each with keys of its own; two may ask for the same expert.
        key_size: of a half key; 0: half of the hidden size.
        gate: of the scores of a head's choices: `softmax` over them, `sigmoid` or `relu`.
    """

    top_k: int = 16
    heads: int = 8
    key_size: int = 0
    gate: str = "softmax"


class Peer(Router):
    """Expert i * B + j has score q1 . c_i + q2 . c'_j, with [q1, q2] = W h; the top k of each head, over their softmax.

    The top k of the sums are among the sums of the top k of each half, so that A + B products and k^2 sums stand in for
    A * B products (section 2, algorithm 1). The paper has A = B; where E is no square, A is the largest divisor below
    its root. Batch normalisation of queries, which the paper's ablation prefers, is left out.

    Implementations: the authors' code is not public (from memory). lucidrains/PEER-pytorch follows algorithm 1 as ours
    does, for squares alone, over a softmax or a ReLU (`gate`); it can normalise tokens first, and give each head
    experts of its own. transformers' Doge has one head, and the projection gives the sub-scores themselves; it splits
    them into halves across the *tokens* of a batch, which its own comment says: with the scores it means ours equals
    it.
    """

    Options = PeerOptions

    @property
    def active(self) -> float:
        """Single neurons, of all heads."""
        return float(self.options.heads * self.options.top_k)

    def __init__(self, hidden_size: int | None, num_experts: int, options: PeerOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts, options)
        if self.options.gate not in GATES:
            raise ValueError(f"gate is {self.options.gate!r}, none of {', '.join(GATES)}")

    @property
    def halves(self) -> tuple[int, int]:
        """A and B."""
        rows = next(rows for rows in range(math.isqrt(self.num_experts), 0, -1) if self.num_experts % rows == 0)
        return rows, self.num_experts // rows

    def make_gate(self, hidden_size: int) -> None:
        """Queries and sub-keys."""
        heads, size = self.options.heads, self.options.key_size or max(1, hidden_size // 2)
        self.query = nn.Parameter(torch.empty(2 * heads * size, hidden_size).normal_(std=hidden_size**-0.5))
        self.row_keys, self.column_keys = (
            nn.Parameter(torch.empty(heads, keys, size).normal_(std=0.02)) for keys in self.halves
        )

    def score(self, hidden_TD: Tensor, context: Context) -> Tensor:
        """Sub-scores: of a head the A rows, then the B columns [T, H * (A + B)]."""
        query_TQ = nn.functional.linear(wide(hidden_TD), wide(self.query))
        of_row_THR, of_column_THR = query_TQ.unflatten(1, (2, self.options.heads, -1)).unbind(1)
        row_THA = torch.einsum("thr,har->tha", of_row_THR, wide(self.row_keys))
        column_THB = torch.einsum("thr,hbr->thb", of_column_THR, wide(self.column_keys))
        return torch.cat([row_THA, column_THB], -1).flatten(1)

    def route(self, scores_TE: Tensor, context: Context) -> Routing:
        """The top k of each head, the heads one after the other."""
        options, (rows, columns) = self.options, self.halves
        score_THE = wide(scores_TE).unflatten(1, (-1, rows + columns))
        row_THK = score_THE[..., :rows].topk(min(options.top_k, rows))
        column_THK = score_THE[..., rows:].topk(min(options.top_k, columns))
        sum_THS = (row_THK.values[..., :, None] + column_THK.values[..., None, :]).flatten(2)
        index_THS = (row_THK.indices[..., :, None] * columns + column_THK.indices[..., None, :]).flatten(2)
        best_THK = sum_THS.topk(options.top_k)
        index_THK = index_THS.gather(2, best_THK.indices)
        return routing(index_THK.flatten(1), GATES[options.gate](best_THK.values).flatten(1))
