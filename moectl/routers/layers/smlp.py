"""sMLP (arXiv 2203.06850): a language model without attention, sparse over tokens and over chunks of the hidden size.

Legend: B sequences, L length, D hidden, C chunks, W = D / C chunk width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.routers.layers.parts import Experts, parameter
from moectl.routers.losses import load_balancing
from moectl.routers.protocol import Context, Router


class ChunkExperts(nn.Module):
    """Cuts hidden states into C chunks; the expert of a chunk mixes it over tokens: z_t = sum_{s <= t} M_ts u_s + b_t.

    `prefix` 0, deterministic routing: chunk c is expert c's. Else partial prediction: the expert of a chunk is the
    argmax of softmax(W_g v), with v the chunk's mean over the first `prefix` share of the tokens; those tokens get
    nothing, since their experts would depend on tokens after them.

    Args:
        hidden_size: D, a multiple of `chunks`.
        num_experts: E.
        max_length: of a sequence.
        chunks: C; with deterministic routing as many as experts.
        prefix: share of the tokens that routing looks at.

    Raises:
        ValueError: sizes do not fit.
    """

    def __init__(self, hidden_size: int, num_experts: int, max_length: int, chunks: int, prefix: float = 0.0) -> None:
        super().__init__()
        if hidden_size % chunks or (not prefix and chunks != num_experts) or not 0 <= prefix < 1:
            raise ValueError(f"{hidden_size} in {chunks} chunks over {num_experts} experts, prefix {prefix}")
        self.chunks, self.prefix = chunks, prefix
        self.mix_ELL = parameter(num_experts, max_length, max_length)
        self.bias_EL = nn.Parameter(torch.ones(num_experts, max_length))
        if prefix:
            self.gate = parameter(num_experts, hidden_size // chunks)

    def forward(self, u_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(z [B, L, D], in training with partial prediction a balancing loss over chunks)."""
        L, E = u_BLD.shape[1], len(self.mix_ELL)
        u_BCLW = u_BLD.unflatten(-1, (self.chunks, -1)).transpose(1, 2)
        mix_ELL, bias_EL1 = self.mix_ELL[:, :L, :L].tril(), self.bias_EL[:, :L, None]
        if not self.prefix:
            return (mix_ELL @ u_BCLW + bias_EL1).transpose(1, 2).flatten(2), u_BLD.new_zeros(())
        seen = max(1, round(self.prefix * L))
        probability_BCE = (u_BCLW[:, :, :seen].mean(2) @ self.gate.T).softmax(-1)
        weight_BC1, index_BC1 = probability_BCE.max(-1, keepdim=True)
        z_BCLW = torch.zeros_like(u_BCLW)
        for expert in range(E):
            batch_R, chunk_R = (index_BC1[..., 0] == expert).nonzero(as_tuple=True)
            z_RLW = weight_BC1[batch_R, chunk_R, :, None] * (
                mix_ELL[expert] @ u_BCLW[batch_R, chunk_R] + bias_EL1[expert]
            )
            z_BCLW = z_BCLW.index_put((batch_R, chunk_R), z_RLW)
        later_L1 = torch.arange(L, device=u_BLD.device)[:, None] >= seen
        loss = u_BLD.new_zeros(())
        if context.training:
            loss = load_balancing(probability_BCE.view(-1, E), index_BC1.view(-1, 1))
        return (z_BCLW * later_L1).transpose(1, 2).flatten(2), loss


class SparseMlp(nn.Module):
    """A sparse block: x = x + W_out chunk_experts(gelu(W_in norm x)), x = x + experts(norm x).

    The first half (sMoE) stands where a transformer has attention, the second (tMoE) routes tokens with any router; the
    paper takes that of BASE layers, and found deterministic routing of chunks best.

    Unverified: written from memory, but for the two ways of routing and what stands where in a block, which are as a
    public review of the paper says.

    Implementations: none is public, as far as we could find (the paper's section 3, number from memory).

    Args:
        hidden_size: D.
        intermediate_size: of each expert for tokens.
        max_length: of a sequence.
        router: of tokens.
        chunk_experts: experts for chunks.
        prefix: 0 or, for partial prediction, 0.2.
        chunks: as of `ChunkExperts`; 0: as many as experts.
        aux_loss: coefficient of the balancing loss over chunks.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        max_length: int,
        router: Router,
        chunk_experts: int = 4,
        prefix: float = 0.0,
        chunks: int = 0,
        aux_loss: float = 0.01,
    ) -> None:
        super().__init__()
        self.aux_loss = aux_loss
        self.into, self.out = parameter(hidden_size, hidden_size), parameter(hidden_size, hidden_size)
        self.chunk_experts = ChunkExperts(hidden_size, chunk_experts, max_length, chunks or chunk_experts, prefix)
        self.router, self.experts = router, Experts(hidden_size, intermediate_size, router.num_experts)
        self.chunk_norm, self.token_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], losses of both routings)."""
        u_BLD = nn.functional.gelu(self.chunk_norm(x_BLD) @ self.into.T)
        z_BLD, chunk_loss = self.chunk_experts(u_BLD, context)
        x_BLD = x_BLD + z_BLD @ self.out.T
        h_TD = self.token_norm(x_BLD).flatten(0, 1)
        routing = self.router(h_TD, context)
        y_BLD = x_BLD + self.experts(h_TD, routing).view_as(x_BLD)
        return y_BLD, self.aux_loss * chunk_loss + routing.aux_loss
