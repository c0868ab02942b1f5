"""Mixture-of-Transformers (arXiv 2411.04996): all weights but attention's softmax are a modality's own.

Legend: T = B * L tokens, D hidden, F width, M modalities.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.routers.labels import labelled, linear
from moectl.routers.layers.parts import attention, heads, parameter
from moectl.routers.protocol import Context


class MixtureOfTransformers(nn.Module):
    """A transformer block: h = x + norm_m(O_m attention(Q_m x, K_m x, V_m x)), y = h + norm_m(ffn_m(h)).

    Attention is over all tokens of a sequence, of whatever modality; the modality m of a token picks its projections,
    its SwiGLU and its RMSNorms. The norms stand after what they normalise, and the residuals outside of them.

    Implementations: one is known, the authors' facebookresearch/Mixture-of-Transformers
    (`simple_ModalityUntiedAttention.py` and the same of FeedForward, README), which is followed, as algorithm 1 of the
    paper has it (number from memory). They are sketches: torch's own modules are given arguments that they do not take.
    Optional norms of queries and keys, shared by a head's width, are left out.

    Args:
        hidden_size: D.
        num_heads: of attention.
        intermediate_size: F.
        modalities: M.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, modalities: int = 2, causal: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.modalities, self.causal = num_heads, modalities, causal
        square = (modalities, hidden_size, hidden_size)
        self.query_MDD, self.key_MDD, self.value_MDD, self.out_MDD = (parameter(*square) for _ in range(4))
        self.gate_MFD, self.up_MFD = (parameter(modalities, intermediate_size, hidden_size) for _ in range(2))
        self.down_MDF = parameter(modalities, hidden_size, intermediate_size)
        self.attention_norm_MD = nn.Parameter(torch.ones(modalities, hidden_size))
        self.ffn_norm_MD = nn.Parameter(torch.ones(modalities, hidden_size))

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], 0), with `context.modality_T` of all B * L tokens.

        Raises:
            ValueError: modalities are missing, or out of range.
        """
        modality_T = labelled(context.modality_T, self.modalities, "modality")
        x_TD = x_BLD.flatten(0, 1)

        def own(x_T: Tensor, weight_MOI: Tensor) -> Tensor:
            return linear(x_T, weight_MOI, modality_T)

        query, key, value = (
            heads(own(x_TD, matrix).view_as(x_BLD), self.num_heads)
            for matrix in (self.query_MDD, self.key_MDD, self.value_MDD)
        )
        attended_TD = attention(query, key, value, self.causal).flatten(1)
        h_TD = x_TD + rms_norm(own(attended_TD, self.out_MDD)) * self.attention_norm_MD[modality_T]
        inner_TF = nn.functional.silu(own(h_TD, self.gate_MFD)) * own(h_TD, self.up_MFD)
        y_TD = h_TD + rms_norm(own(inner_TF, self.down_MDF)) * self.ffn_norm_MD[modality_T]
        return y_TD.view_as(x_BLD), x_BLD.new_zeros(())


def rms_norm(x_TD: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-5)."""
    return nn.functional.rms_norm(x_TD, x_TD.shape[-1:], eps=1e-5)
