"""What is drawn in training: jitter, GShard's second choices, GRIN's samples and its estimate of their gradient.

Legend: T tokens, D hidden, E experts, K choices.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.routers.grin import Grin, GrinOptions
from moectl.routers.gshard import GShard, GShardOptions
from moectl.routers.noise import gumbel_like, jittered
from moectl.routers.protocol import NO_EXPERT, Context
from moectl.routers.registry import find


def training(seed: int = 0) -> Context:
    return Context(training=True, generator=torch.Generator().manual_seed(seed))


def test_jitter_is_uniform_and_of_training_alone() -> None:
    hidden_TD = torch.full((200, 50), 2.0, dtype=torch.bfloat16)
    drawn_TD = jittered(hidden_TD, 0.1, training()) / 2
    assert drawn_TD.dtype == torch.float32
    assert 0.9 <= drawn_TD.min() < 0.901 and 1.099 < drawn_TD.max() <= 1.1
    assert drawn_TD.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert torch.equal(jittered(hidden_TD, 0.1, Context()), hidden_TD.float())


@pytest.mark.parametrize("name", ["switch", "mixtral", "gshard", "grin"])
def test_jitter_moves_the_scores(name: str) -> None:
    kind, hidden_TD = find(name).load(), torch.randn(4, 6)
    router = kind(6, 8, kind.Options(jitter=0.05))
    plain_TE = hidden_TD @ router.weight.T
    assert not torch.allclose(router.score(hidden_TD, training()), plain_TE)
    torch.testing.assert_close(router.score(hidden_TD, Context()), plain_TE)


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits_E = torch.tensor([1.0, 0.0, -1.0])
    noisy_NE = logits_E + gumbel_like(logits_E.expand(40_000, 3), torch.Generator().manual_seed(0))
    share_E = noisy_NE.argmax(1).bincount(minlength=3) / 40_000
    torch.testing.assert_close(share_E, logits_E.softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(("weight", "threshold"), [(0.1, 0.5), (0.3, 0.5), (0.1, 0.2), (0.4, 0.2)])
def test_gshard_takes_a_second_expert_by_its_weight(weight: float, threshold: float) -> None:
    """With probability min(1, weight / threshold); the first one always, and its weight stays."""
    scores_TE = torch.tensor([[1 - weight, weight, 1e-9]]).log().expand(4000, 3)
    router = GShard(None, 3, GShardOptions(capacity_factor=0.0, second=threshold))
    routing = router.route(scores_TE, training())
    assert (routing.index_TK[:, 0] == 0).all() and not routing.dropped_TK.any()
    taken_T = routing.index_TK[:, 1] != NO_EXPERT
    assert taken_T.double().mean().item() == pytest.approx(min(1, weight / threshold), abs=0.03)
    torch.testing.assert_close(routing.weight_TK[:, 0], torch.full((4000,), 1 - weight))


def test_gshard_draws_a_second_expert_from_what_is_left() -> None:
    """As DeepSpeed and fairseq do; weights are those of the two, whichever is drawn."""
    share_E = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    router = GShard(None, 4, GShardOptions(capacity_factor=0.0, sampled=True))
    routing = router.route(share_E.log().expand(20_000, 4), training())
    assert (routing.index_TK[:, 0] == 0).all() and not routing.dropped_TK.any()
    second_T = routing.index_TK[:, 1]
    torch.testing.assert_close(second_T.bincount() / 20_000, (2 * share_E).float() * (share_E < 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(routing.weight_TK[:, 1], share_E[second_T] / (0.5 + share_E[second_T]))
    in_use = router.route(share_E.log()[None], Context())
    assert in_use.index_TK.tolist() == [[0, 1]]
    three = GShard(None, 4, GShardOptions(top_k=3, capacity_factor=0.0, sampled=True))
    drawn_TK = three.route(share_E.log().expand(50, 4), training()).index_TK
    assert all(len(set(row)) == 3 for row in drawn_TK.tolist())


def masked_softmax(scores_TE: Tensor, taken_T1: Tensor, threshold: float) -> Tensor:
    """As section 3 has it: of what is neither taken nor far below the best that is left."""
    left_TE = scores_TE.scatter(1, taken_T1, -torch.inf)
    best_T1 = left_TE.amax(1, keepdim=True)
    far_TE = (best_T1 - scores_TE) / torch.maximum(scores_TE.abs(), best_T1) > 2 * threshold
    return left_TE.masked_fill(far_TE, -torch.inf).softmax(1)


def test_grin_samples_from_the_masked_softmax_and_weighs_by_heun() -> None:
    """A third of the weight, three times in four, where it is not the likeliest one."""
    row_E = torch.tensor([1.0, 0.8, 0.5, -1.0])
    scores_TE = row_E.expand(40_000, 4)
    routing = Grin(None, 4, GrinOptions(top_k=1, threshold=0.3)).route(scores_TE, training())
    probability_E = masked_softmax(row_E[None], torch.zeros(1, 0, dtype=torch.int64), 0.3)[0]
    assert probability_E[3] == 0
    share_E = routing.index_TK.flatten().bincount(minlength=4) / 40_000
    torch.testing.assert_close(share_E, probability_E, atol=0.01, rtol=0)
    for expert in range(3):
        ratio_N = routing.weight_TK[routing.index_TK == expert] / probability_E[expert]
        whole_N = ratio_N > 0.9
        torch.testing.assert_close(ratio_N, torch.where(whole_N, 1.0, 1 / 3))
        assert whole_N.double().mean().item() == pytest.approx(1.0 if expert == 0 else 0.25, abs=0.02)


def test_the_gradient_of_grin_is_that_of_the_whole_weight() -> None:
    """Whatever Heun's factor is: not that of what is returned, which is why gradcheck does not hold."""
    scores_TE = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    routing = Grin(None, 6, GrinOptions(top_k=2, threshold=0.4, aux_loss=0.0)).route(scores_TE, training())
    mix_TK = torch.randn(64, 2, dtype=torch.float64)
    (found_TE,) = torch.autograd.grad((routing.weight_TK * mix_TK).sum(), scores_TE, retain_graph=True)
    nobody_T0, first_T1 = torch.zeros(64, 0, dtype=torch.int64), routing.index_TK[:, :1]
    whole_TK = torch.cat(
        [
            masked_softmax(scores_TE, nobody_T0, 0.4).gather(1, first_T1),
            masked_softmax(scores_TE, first_T1, 0.4).gather(1, routing.index_TK[:, 1:]),
        ],
        1,
    )
    (expected_TE,) = torch.autograd.grad((whole_TK * mix_TK).sum(), scores_TE)
    torch.testing.assert_close(found_TE, expected_TE)
    assert (routing.weight_TK < 0.9 * whole_TK).any()


def test_grin_in_training_is_phimoe_with_the_same_draws() -> None:
    """Index, weight and gradient of the first choice; the draw of the second's factor is another in transformers."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    config: Any = SimpleNamespace(hidden_size=6, num_local_experts=8, num_experts_per_tok=2)
    config.router_jitter_noise, config.input_jitter_noise = 0.3, 0.0
    theirs = PhimoeTopKRouter(config).train()
    ours = Grin(6, 8, GrinOptions(threshold=0.3, jitter=0.0, aux_loss=0.0))
    ours.load_state_dict(theirs.state_dict())
    hidden_TD, gradients = torch.randn(50, 6), []
    for router in (theirs, ours):
        torch.manual_seed(5)
        if router is theirs:
            _logits, weight_TK, index_TK = theirs(hidden_TD)
        else:
            routing = ours(hidden_TD, Context(training=True))
            weight_TK, index_TK = routing.weight_TK, routing.index_TK
        gradients.append((index_TK, weight_TK[:, 0], *torch.autograd.grad(weight_TK[:, 0].sum(), router.weight)))
    assert torch.equal(gradients[0][0][:, 0], gradients[1][0][:, 0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], atol=1e-4, rtol=1e-4)  # 0.3333 is its third
    assert (gradients[0][1] < 0.34).any()
    torch.testing.assert_close(gradients[0][2], gradients[1][2], atol=1e-3, rtol=1e-3)
