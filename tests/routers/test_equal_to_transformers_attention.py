"""MoA beside transformers' JetMoe: the gate alone, and a layer of attention's experts."""

from __future__ import annotations

import pytest
import torch
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA, JetMoeTopKGating

from moectl.routers.layers.attention import MoaAttention
from moectl.routers.moa import Moa, MoaOptions
from moectl.routers.protocol import Context

T, D, E, W = 64, 12, 8, 6


def jetmoe(gate: JetMoeTopKGating, hidden_TD: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weight of each token, out of the order in which JetMoe has sorted them by expert."""
    sorted_S, _, gate_S, size_E, _ = gate(hidden_TD)
    index_S, weight_S = torch.empty(T * top_k, dtype=torch.int64), torch.empty(T * top_k)
    index_S[sorted_S] = torch.arange(E).repeat_interleave(torch.tensor(size_E))
    weight_S[sorted_S] = gate_S.detach()
    return index_S.view(T, top_k), weight_S.view(T, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_gate(top_k: int) -> None:
    torch.manual_seed(0)
    gate = JetMoeTopKGating(D, E, top_k)
    router = Moa(D, E, MoaOptions(top_k=top_k))
    router.weight.data.copy_(gate.layer.weight.data)
    hidden_TD = torch.randn(T, D)
    found = router(hidden_TD)
    index_TK, weight_TK = jetmoe(gate, hidden_TD, top_k)
    assert torch.equal(found.index_TK, index_TK)
    torch.testing.assert_close(found.weight_TK, weight_TK, atol=1e-6, rtol=1e-6)


def test_the_layer() -> None:
    """Its query and output experts, around plain attention with one shared head, without JetMoe's rotations."""
    torch.manual_seed(0)
    config = JetMoeConfig(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=3, kv_channels=W, num_key_value_heads=1
    )
    theirs, ours = JetMoeMoA(config), MoaAttention(D, W, Moa(D, E, MoaOptions(top_k=3)))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(theirs.bias)
    ours.router.weight.data.copy_(theirs.router.layer.weight.data)
    ours.query_EWD.data.copy_(theirs.input_linear.weight.data)
    ours.out_EDW.data.copy_(theirs.output_linear.weight.data)
    x_BLD = torch.randn(2, 9, D)
    query_BLKW, _, topology = theirs.map(x_BLD)
    score_BKLS = torch.einsum("blkw,bsw->bkls", query_BLKW, x_BLD @ ours.key_WD.T) / W**0.5
    score_BKLS = score_BKLS.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    attended_BLKW = torch.einsum("bkls,bsw->blkw", score_BKLS.softmax(-1), x_BLD @ ours.value_WD.T)
    y_BLD, _ = ours(x_BLD, Context())
    torch.testing.assert_close(y_BLD, theirs.reduce(attended_BLKW, topology), atol=1e-6, rtol=1e-5)
