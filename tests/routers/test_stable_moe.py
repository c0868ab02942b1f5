"""StableMoE's two stages and the losses of the first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moectl.routers.protocol import Context
from moectl.routers.stable_moe import StableMoe, StableMoeOptions

HIDDEN_TD = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKEN_T = torch.randint(0, 20, (64,), generator=torch.Generator().manual_seed(0))
FIRST, SECOND = (Context(training=True, token_T=TOKEN_T, progress=progress) for progress in (0.05, 0.5))
USE = Context(token_T=TOKEN_T)


def gate(**options: float) -> StableMoe:
    torch.manual_seed(2)
    chosen = StableMoeOptions(vocab_size=20, capacity_factor=0, **options)  # type: ignore[arg-type]
    return StableMoe(6, 4, chosen).double()


def test_the_first_stage_takes_the_greedy_choice_and_the_second_the_tokens_own() -> None:
    router = gate()
    greedy_T = (HIDDEN_TD @ router.weight.t()).argmax(1)
    assert torch.equal(router(HIDDEN_TD, FIRST).index_TK[:, 0], greedy_T)
    own_T = (router.embedding[TOKEN_T] @ router.distilled_weight.t()).argmax(1)
    for context in (SECOND, USE):
        for hidden_TD in (HIDDEN_TD, -HIDDEN_TD):
            assert torch.equal(router(hidden_TD, context).index_TK[:, 0], own_T)


def test_losses_of_the_first_stage_by_hand() -> None:
    router = gate(aux_loss=0.7, distill=0.2)
    scores = (HIDDEN_TD @ router.weight.t()).detach().numpy()
    distilled = (router.embedding[TOKEN_T] @ router.distilled_weight.t()).detach().numpy()
    total = 0.0
    for expert in range(4):
        mine = [t for t in range(64) if scores[t].argmax() == expert]
        sigmoids = sum(1 / (1 + np.exp(-scores[t, expert])) for t in mine)
        total += 0.7 * (len(mine) - 16) / 16 * sigmoids / 64
    for t in range(64):
        total += 0.2 * (np.log(np.exp(distilled[t]).sum()) - distilled[t, scores[t].argmax()]) / 64
    assert abs(router(HIDDEN_TD, FIRST).aux_loss.item() - total) < 1e-12
    assert router(HIDDEN_TD, SECOND).aux_loss == router(HIDDEN_TD, USE).aux_loss == 0


def test_distillation_teaches_the_distilled_router_alone_and_freezing_stops_it() -> None:
    router = gate(aux_loss=0.0)
    hidden_TD = HIDDEN_TD.clone().requires_grad_()
    router(hidden_TD, FIRST).aux_loss.backward()
    assert router.embedding.grad is not None and router.distilled_weight.grad is not None
    assert hidden_TD.grad is not None and hidden_TD.grad.abs().max() == 0
    router = gate()
    router(HIDDEN_TD, SECOND).weight_TK.sum().backward()
    assert router.embedding.grad is None and router.distilled_weight.grad is None and router.weight.grad is not None


def test_the_distilled_router_comes_to_choose_as_the_learnt_one() -> None:
    """On hidden states that the token determines."""
    router, hidden_TD = gate(aux_loss=0.0), torch.randn(20, 6, dtype=torch.float64)[TOKEN_T]
    learnt = router(hidden_TD, FIRST).index_TK
    before = (router(hidden_TD, USE).index_TK == learnt).double().mean()
    step = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        step.zero_grad()
        router(hidden_TD, FIRST).aux_loss.backward()
        step.step()
    assert before < 0.6 and torch.equal(router(hidden_TD, USE).index_TK, learnt)


def test_the_balancing_loss_lowers_scores_of_busy_experts_and_raises_those_of_idle_ones() -> None:
    router = gate(distill=0.0)
    scores_TE = (HIDDEN_TD @ router.weight.t()).detach().requires_grad_()
    found = router.route(scores_TE, FIRST)
    (found.aux_loss).backward()
    load_E = found.index_TK.flatten().bincount(minlength=4)
    assert scores_TE.grad is not None
    assert torch.equal(scores_TE.grad.sum(0).sign(), (load_E - 16).sign().double())


def test_without_token_ids_it_says_so() -> None:
    with pytest.raises(ValueError, match="token ids"):
        gate()(HIDDEN_TD)
