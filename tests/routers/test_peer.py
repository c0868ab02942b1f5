"""Product keys against all products, and Doge's against ours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers.models.doge.configuration_doge import DogeConfig
from transformers.models.doge.modeling_doge import DogeCDMoE

from moectl.routers.peer import Peer, PeerOptions
from moectl.routers.protocol import Context


def all_products(scores_TE: torch.Tensor, rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of every sum of a row's and a column's score, one head."""
    best = (scores_TE[:, :rows, None] + scores_TE[:, None, rows:]).flatten(1).topk(top_k)
    return best.indices, best.values.softmax(-1)


@settings(max_examples=40, deadline=None)
@given(some.sampled_from([(4, 2, 2), (12, 3, 4), (16, 4, 4), (30, 5, 6), (7, 1, 7), (64, 8, 8)]), some.data())
def test_the_top_of_all_products_is_found(shape: tuple[int, int, int], data: some.DataObject) -> None:
    experts, rows, columns = shape
    top_k = data.draw(some.integers(1, experts))
    router = Peer(None, experts, PeerOptions(top_k=top_k, heads=1))
    assert router.halves == (rows, columns)
    seed = data.draw(some.integers(0, 2**31))
    scores_TE = torch.randn(5, rows + columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = router.route(scores_TE, Context())
    index_TK, weight_TK = all_products(scores_TE, rows, top_k)
    assert torch.equal(found.index_TK, index_TK)
    torch.testing.assert_close(found.weight_TK, weight_TK)


def test_fewer_sub_keys_than_k_would_miss_some() -> None:
    """The planted error: k - 1 of each half are not enough."""
    scores_TE = torch.tensor([[3.0, 0, -9, -9, 9.0, 8, 7, -9]])
    right, _ = all_products(scores_TE, 4, 3)
    assert torch.equal(Peer(None, 16, PeerOptions(top_k=3, heads=1)).route(scores_TE, Context()).index_TK, right)
    assert 2 in right and 2 not in scores_TE[0, 4:].topk(2).indices


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
def test_gates(gate: str) -> None:
    scores_TE = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Peer(None, 16, PeerOptions(top_k=5, heads=1, gate=gate)).route(scores_TE, Context())
    sum_TK = scores_TE[:, :4].gather(1, found.index_TK // 4) + scores_TE[:, 4:].gather(1, found.index_TK % 4)
    wanted_TK = {"softmax": sum_TK.softmax(-1), "sigmoid": sum_TK.sigmoid(), "relu": sum_TK.relu()}[gate]
    torch.testing.assert_close(found.weight_TK, wanted_TK)
    with pytest.raises(ValueError, match="none of softmax"):
        Peer(None, 16, PeerOptions(top_k=5, gate="tanh"))


@pytest.mark.parametrize("normalised", [False, True])
def test_doge_routes_the_same_given_the_scores_that_it_mixes(normalised: bool) -> None:
    torch.manual_seed(0)
    config = DogeConfig(
        hidden_size=12, intermediate_size=8, num_experts=16, num_experts_per_tok=5, norm_topk_prob=normalised
    )
    layer = DogeCDMoE(config).double()
    hidden_BLD = torch.randn(2, 7, 12, dtype=torch.float64)
    output_BLD, halves_2TA = layer(hidden_BLD)
    found = Peer(None, 16, PeerOptions(top_k=5, heads=1)).route(halves_2TA.transpose(0, 1).flatten(1), Context())
    x_TD = hidden_BLD.flatten(0, 1)
    inner_TK = layer.act_fn((layer.down_embed(found.index_TK) * x_TD[:, None]).sum(-1)) * found.weight_TK
    routed_TD = (inner_TK[..., None] * layer.up_embed(found.index_TK)).sum(1)
    shared_TD = layer.down_proj(layer.act_fn(layer.gate_proj(x_TD)) * layer.up_proj(x_TD))
    torch.testing.assert_close(output_BLD.flatten(0, 1), routed_TD + shared_TD)
