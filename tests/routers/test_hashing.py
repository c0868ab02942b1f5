"""Tables and hashes: published numbers, transformers' class, even loads, boundaries. Legend: T tokens, V ids."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from moectl.routers.hashing import (
    DeepSeekV4Hash,
    DeepSeekV4HashOptions,
    Hash,
    HashOptions,
    balanced_table,
    dispersed_table,
    feature,
    scrambled,
)
from moectl.routers.protocol import Context, counts


def test_the_scrambled_numbers_are_those_of_splitmix64() -> None:
    """The first outputs from 1234567, as published with the generator (Rosetta Code), without their highest bit."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert scrambled(torch.arange(4), 1234567).tolist() == [number % 2**63 for number in published]


def test_deepseek_v4s_hash_router_is_transformers() -> None:
    config = DeepseekV4Config(
        hidden_size=16, n_routed_experts=8, num_experts_per_tok=3, vocab_size=50, routed_scaling_factor=1.5
    )
    torch.manual_seed(0)
    theirs = DeepseekV4HashRouter(config)
    torch.nn.init.normal_(theirs.weight)
    theirs.tid2eid.copy_(torch.stack([torch.randperm(8)[:3] for _ in range(50)]))
    ours = DeepSeekV4Hash(16, 8, DeepSeekV4HashOptions(top_k=3, vocab_size=50))
    ours.load_state_dict({"weight": theirs.weight, "table_VK": theirs.tid2eid})
    hidden_TD, token_T = torch.randn(40, 16), torch.randint(50, (40,))
    _, weight_TK, index_TK = theirs(hidden_TD, token_T)
    found = ours(hidden_TD, Context(token_T=token_T))
    assert torch.equal(found.index_TK, index_TK)
    torch.testing.assert_close(found.weight_TK, weight_TK, atol=1e-6, rtol=1e-6)
    ours.table_VK.copy_(ours.table_VK.flip(1))
    assert not torch.equal(ours(hidden_TD, Context(token_T=token_T)).index_TK, index_TK)


def test_a_table_is_what_it_stands_for_until_it_is_replaced() -> None:
    token_T = torch.arange(100)
    table, none = Hash(None, 8, HashOptions(vocab_size=100)), Hash(None, 8)
    scores_TE, context = torch.zeros(100, 8), Context(token_T=token_T)
    assert torch.equal(table.route(scores_TE, context).index_TK, none.route(scores_TE, context).index_TK)
    count_V = [1000 // (rank + 1) for rank in range(100)]
    table.table_VK.copy_(balanced_table(count_V, 8))
    text_T = token_T.repeat_interleave(torch.tensor(count_V))
    load_E = counts(table.route(torch.zeros(len(text_T), 8), Context(token_T=text_T)).index_TK, 8)
    random_E = counts(none.route(torch.zeros(len(text_T), 8), Context(token_T=text_T)).index_TK, 8)
    assert load_E.max() == 1000 and sorted(load_E.tolist())[-2] - load_E.min() <= 10
    assert random_E.max() > 1.1 * load_E.max()


def test_the_most_frequent_id_goes_to_the_emptiest_expert() -> None:
    assert balanced_table([1, 9, 5, 4, 3], 2)[:, 0].tolist() == [1, 0, 1, 1, 0]


def test_ids_of_one_cluster_are_spread_over_experts() -> None:
    cluster_V = torch.tensor([2, 0, 2, 2, 1, 0, 2])
    assert dispersed_table(cluster_V, 3)[:, 0].tolist() == [0, 0, 1, 2, 0, 1, 0]


def test_what_is_hashed_stops_at_the_beginning_of_a_sequence() -> None:
    token_T, sequence_T = torch.tensor([7, 8, 7, 8, 9]), torch.tensor([0, 0, 1, 1, 1])
    assert feature("position", token_T, sequence_T).tolist() == [0, 1, 0, 1, 2]
    assert feature("previous", token_T, sequence_T).tolist() == [-1, 7, -1, 7, 8]
    pair_T = feature("bigram", token_T, sequence_T)
    assert pair_T[0] == pair_T[2] and pair_T[1] == pair_T[3] and len(pair_T.unique()) == 3
    assert feature("previous", token_T, None).tolist() == [-1, 7, 8, 7, 8]


def test_what_cannot_be_hashed_is_said() -> None:
    with pytest.raises(ValueError, match="none of token, previous"):
        Hash(None, 8, HashOptions(of="future"))
    with pytest.raises(ValueError, match="a table with a vocab_size is of tokens"):
        Hash(None, 8, HashOptions(of="bigram", vocab_size=9))
    with pytest.raises(ValueError, match="the context has none"):
        Hash(None, 8).route(torch.zeros(3, 8), Context())
