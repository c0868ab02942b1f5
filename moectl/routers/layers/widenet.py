"""WideNet (arXiv 2107.11817): a transformer as deep as wished with the weights of one block, whose MLP is a MoE.

Legend: B sequences, L length, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from moectl.routers.layers.parts import Experts, SelfAttention
from moectl.routers.protocol import Context, Router


class WideNet(nn.Module):
    """`depth` times x = x + attention(norm_i x), x = x + experts(norm'_i x), with one attention, one router, one set of
    experts for all; each time has LayerNorms of its own, so that the router sees each depth differently.

    Implementations: one is known, the authors' XueFuzhao/WideNet_Code (`modeling.py`, `model_configs.py`; the paper's
    section 3, number from memory). Its router is V-MoE's (noise of N(0, 1/E) in training, a capacity) with the
    balancing loss of Switch, added up over the depth. Places count from 1 there, and the last is never given, so that
    an expert takes one token fewer than its room; all choices of a token queue together, not rank by rank. Its experts
    have a second GELU, after their second matrix, and biases.

    Args:
        hidden_size: D.
        num_heads: of attention.
        intermediate_size: of each expert.
        depth: how often the block is run.
        router: over hidden states; holds the number of experts.
        causal: whether a token sees only those before it; the paper's models are encoders.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        depth: int,
        router: Router,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden_size, num_heads, causal)
        self.router = router
        self.experts = Experts(hidden_size, intermediate_size, router.num_experts)
        self.attention_norms = nn.ModuleList(nn.LayerNorm(hidden_size, eps=1e-6) for _ in range(depth))
        self.expert_norms = nn.ModuleList(nn.LayerNorm(hidden_size, eps=1e-6) for _ in range(depth))

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], the router's losses added up over the depth)."""
        aux_loss = x_BLD.new_zeros(())
        for attention_norm, expert_norm in zip(self.attention_norms, self.expert_norms, strict=True):
            x_BLD = x_BLD + self.attention(attention_norm(x_BLD))
            h_TD = expert_norm(x_BLD).flatten(0, 1)
            routing = self.router(h_TD, context)
            x_BLD = x_BLD + self.experts(h_TD, routing).view_as(x_BLD)
            aux_loss = aux_loss + routing.aux_loss
        return x_BLD, aux_loss
