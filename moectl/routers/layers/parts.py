"""What the layers are made of: experts under a routing, and attention.

Legend: B sequences, L length, T = B * L tokens, R some of them, D hidden, F expert width, E experts, K choices,
H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moectl.routers.protocol import Routing


def mixed(x_TD: Tensor, routing: Routing, num_experts: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """y_t = sum_k weight_tk * expert(index_tk, x_t) [T, D]; where there is NO_EXPERT, nothing."""
    y_TD = torch.zeros_like(x_TD)
    for number, token_R, _, weight_R1 in chosen(routing, num_experts):
        y_TD = y_TD.index_add(0, token_R, weight_R1.to(x_TD.dtype) * expert(number, x_TD[token_R]))
    return y_TD


def chosen(routing: Routing, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each expert that has tokens: its number, the tokens, which choice of theirs it is, and the weights [R, 1]."""
    for number in range(num_experts):
        token_R, choice_R = (routing.index_TK == number).nonzero(as_tuple=True)
        if len(token_R):
            yield number, token_R, choice_R, routing.weight_TK[token_R, choice_R, None]


def parameter(*shape: int) -> nn.Parameter:
    """A matrix, or a stack of them, that keeps the scale of what it is multiplied with over its last dimension."""
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Experts(nn.Module):
    """E two-layer networks with GELU: W2_e gelu(W1_e x), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.up_EFD = parameter(num_experts, intermediate_size, hidden_size)
        self.down_EDF = parameter(num_experts, hidden_size, intermediate_size)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What each token's experts say, weighted and added up [T, D]."""

        def expert(number: int, x_RD: Tensor) -> Tensor:
            return nn.functional.gelu(x_RD @ self.up_EFD[number].T) @ self.down_EDF[number].T

        return mixed(x_TD, routing, len(self.up_EFD), expert)


def heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    """[B, H, L, W]."""
    return x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention(query_BHLW: Tensor, key_BHLW: Tensor, value_BHLW: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention of each head [T, H, W]."""
    attended_BHLW = nn.functional.scaled_dot_product_attention(query_BHLW, key_BHLW, value_BHLW, is_causal=causal)
    return attended_BHLW.transpose(1, 2).flatten(0, 1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with its projections, no biases."""

    def __init__(self, hidden_size: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.query, self.key, self.value, self.out = (parameter(hidden_size, hidden_size) for _ in range(4))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D]."""
        query, key, value = (heads(x_BLD @ matrix.T, self.num_heads) for matrix in (self.query, self.key, self.value))
        return (attention(query, key, value, self.causal).flatten(1) @ self.out.T).view_as(x_BLD)
