"""Cross-token modelling with conditional computation, or Sparse-MLP (arXiv 2109.02008): an MLP-Mixer of experts.

Legend: B images, L patches, D channels, P = B * D / 2 half channels of all images.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moectl.routers.layers.parts import Experts, parameter
from moectl.routers.protocol import Context, Router


class CrossToken(nn.Module):
    """Experts over tokens, then over channels, with a re-representation around the first.

    x = x + R_out(experts_over_tokens(R_in(norm x))), x = x + experts(norm x). R_in halves the channels and doubles the
    patches, so that a channel, which is what the first router routes, is no shorter than a patch; R_out undoes it. It
    looks at all patches: for images, not for language.

    Both routers of the paper are V-MoE's: TopK(softmax(W_g x + N(0, 1/E))), a half each of importance and load loss;
    top-1 over tokens and more over channels.

    Unverified: what the abstract of the paper says was read, and its gate, losses and sizes in a public review.

    Implementations: none is public, as far as we could find (the paper's section 3, number from memory).

    Args:
        hidden_size: D, even.
        length: L, of every image.
        token_width: of each expert over tokens.
        channel_width: of each expert over channels.
        token_router: over columns of 2L patches: its hidden size.
        channel_router: over patches.
    """

    def __init__(
        self,
        hidden_size: int,
        length: int,
        token_width: int,
        channel_width: int,
        token_router: Router,
        channel_router: Router,
    ) -> None:
        super().__init__()
        self.token_router, self.channel_router = token_router, channel_router
        self.narrow, self.widen = parameter(hidden_size // 2, hidden_size), parameter(hidden_size, hidden_size // 2)
        self.lengthen, self.shorten = parameter(2 * length, length), parameter(length, 2 * length)
        self.token_experts = Experts(2 * length, token_width, token_router.num_experts)
        self.channel_experts = Experts(hidden_size, channel_width, channel_router.num_experts)
        self.token_norm, self.channel_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], both routers' losses)."""
        unlabelled = replace(context, token_T=None, sequence_T=None, task_T=None, modality_T=None)
        narrow_BDL = (self.token_norm(x_BLD) @ self.narrow.T).transpose(1, 2)
        column_PL = (narrow_BDL @ self.lengthen.T).flatten(0, 1)
        across = self.token_router(column_PL, unlabelled)
        mixed_BDL = self.token_experts(column_PL, across).view(*narrow_BDL.shape[:2], -1) @ self.shorten.T
        x_BLD = x_BLD + mixed_BDL.transpose(1, 2) @ self.widen.T
        h_TD = self.channel_norm(x_BLD).flatten(0, 1)
        within = self.channel_router(h_TD, context)
        y_BLD = x_BLD + self.channel_experts(h_TD, within).view_as(x_BLD)
        return y_BLD, across.aux_loss + within.aux_loss
