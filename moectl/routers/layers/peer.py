"""The experts of PEER (arXiv 2407.04153): very many, of one neuron each. The router is `moectl.routers.peer.Peer`.

Legend: T tokens, D hidden, N experts, K choices of all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, gelu


class Neurons(nn.Module):
    """y = sum_k w_k gelu(u_k . x) v_k, with u and v of the K experts chosen (section 2.2, eq. 3).

    It is called as the experts of transformers' families are. The paper does not say what u and v begin as; here as the
    rows of a linear layer of D inputs.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_ND, self.down_ND = (
            nn.Parameter(torch.empty(num_experts, hidden_size).normal_(std=hidden_size**-0.5)) for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [T, D], experts and their weights [T, K] -> [T, D]."""
        up_TKD = embedding(top_k_index, self.up_ND)
        neuron_TK = gelu(torch.einsum("td,tkd->tk", hidden_states, up_TKD)) * top_k_weights.to(hidden_states.dtype)
        return embedding_bag(top_k_index, self.down_ND, mode="sum", per_sample_weights=neuron_TK)
