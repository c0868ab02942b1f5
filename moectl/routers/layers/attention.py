"""Attention whose projections are experts: MoA (arXiv 2210.05144) and SwitchHead (arXiv 2312.07987).

Legend: B sequences, L length, T = B * L tokens, D hidden, H heads, W head width, E experts, K choices, R = some tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.routers.layers.parts import attention, chosen, heads, parameter
from moectl.routers.protocol import Context, Router
from moectl.routers.switchhead import SwitchHead, SwitchHeadOptions


class MoaAttention(nn.Module):
    """y_t = sum_k w_tk O_e attention(Q_e x_t, keys, values), with e the expert of choice k: heads are what is chosen.

    Implementations: the authors' yikangshen/MoA (`moa_attention.py`) is followed: keys and values are one head,
    projected once (the paper's section 3, number from memory). JetMoe in transformers has several heads in an expert,
    keys and values as many, rotary positions, and a bias after the mixture; with one head and no positions or bias ours
    equals it.

    Args:
        hidden_size: D.
        head_size: W.
        router: `Moa`, or any over hidden states.
        causal: whether a token sees only those before it.
    """

    def __init__(self, hidden_size: int, head_size: int, router: Router, causal: bool = True) -> None:
        super().__init__()
        self.router, self.causal = router, causal
        self.query_EWD = parameter(router.num_experts, head_size, hidden_size)
        self.out_EDW = parameter(router.num_experts, hidden_size, head_size)
        self.key_WD, self.value_WD = parameter(head_size, hidden_size), parameter(head_size, hidden_size)

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], the router's loss); no residual."""
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(x_TD, context)
        K = routing.index_TK.shape[1]
        query_TKW = x_TD.new_zeros(len(x_TD), K, len(self.key_WD))
        for number, token_R, choice_R, _ in chosen(routing, len(self.query_EWD)):
            query_TKW = query_TKW.index_put((token_R, choice_R), x_TD[token_R] @ self.query_EWD[number].T)
        query_BKLW = query_TKW.unflatten(0, x_BLD.shape[:2]).transpose(1, 2)
        key_BKLW = (x_BLD @ self.key_WD.T)[:, None].expand(-1, K, -1, -1)
        value_BKLW = (x_BLD @ self.value_WD.T)[:, None].expand(-1, K, -1, -1)
        attended_TKW = attention(query_BKLW, key_BKLW, value_BKLW, self.causal)
        y_TD = torch.zeros_like(x_TD)
        for number, token_R, choice_R, weight_R1 in chosen(routing, len(self.out_EDW)):
            out_RD = attended_TKW[token_R, choice_R] @ self.out_EDW[number].T
            y_TD = y_TD.index_add(0, token_R, weight_R1.to(x_TD.dtype) * out_RD)
        return y_TD.view_as(x_BLD), routing.aux_loss


class SwitchHeadAttention(nn.Module):
    """y_t = sum_h sum_e w_the O_he attention_h(Q_h x, K_h x, sum_e v_the V_he x): experts in values and outputs alone.

    Queries and keys are ordinary. Values are routed by the token they are of, outputs by the token that asks.

    Implementations: one is known, the authors' RobertCsordas/switchhead (`SwitchHeadCore`; the paper's section 2,
    number from memory), and this is its core: values routed by keys' tokens, outputs by queries'. It has positions,
    rotary or as in Transformer-XL, and dropout of queries, which are left out.

    Args:
        hidden_size: D.
        head_size: W.
        num_experts: E of each head.
        options: of both routers: heads, experts per token and head.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self, hidden_size: int, head_size: int, num_experts: int, options: SwitchHeadOptions, causal: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.causal = options.heads, causal
        self.of_values = SwitchHead(hidden_size, num_experts, options)
        self.of_outputs = SwitchHead(hidden_size, num_experts, options)
        self.query, self.key = (parameter(options.heads * head_size, hidden_size) for _ in range(2))
        self.value_SWD = parameter(options.heads * num_experts, head_size, hidden_size)
        self.out_SDW = parameter(options.heads * num_experts, hidden_size, head_size)

    def forward(self, x_BLD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y [B, L, D], 0); no residual."""
        x_TD = x_BLD.flatten(0, 1)
        values, outputs = self.of_values(x_TD, context), self.of_outputs(x_TD, context)
        per_head = values.index_TK.shape[1] // self.heads
        value_THW = x_TD.new_zeros(len(x_TD), self.heads, self.value_SWD.shape[1])
        for number, token_R, choice_R, weight_R1 in chosen(values, len(self.value_SWD)):
            value_RW = weight_R1.to(x_TD.dtype) * (x_TD[token_R] @ self.value_SWD[number].T)
            value_THW = value_THW.index_put((token_R, choice_R // per_head), value_RW, accumulate=True)
        value_BHLW = value_THW.unflatten(0, x_BLD.shape[:2]).transpose(1, 2)
        query_BHLW, key_BHLW = (heads(x_BLD @ matrix.T, self.heads) for matrix in (self.query, self.key))
        attended_THW = attention(query_BHLW, key_BHLW, value_BHLW, self.causal)
        y_TD = torch.zeros_like(x_TD)
        for number, token_R, choice_R, weight_R1 in chosen(outputs, len(self.out_SDW)):
            out_RD = attended_THW[token_R, choice_R // per_head] @ self.out_SDW[number].T
            y_TD = y_TD.index_add(0, token_R, weight_R1.to(x_TD.dtype) * out_RD)
        return y_TD.view_as(x_BLD), values.aux_loss + outputs.aux_loss
