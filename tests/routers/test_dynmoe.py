"""DynMoE's straight-through gradient, its exceptions, its loss."""

from __future__ import annotations

import torch

from moectl.routers.dynmoe import DynMoe, DynMoeOptions
from moectl.routers.protocol import Context


def gate(threshold: float = 0.0, **options: float) -> DynMoe:
    torch.manual_seed(0)
    made = DynMoe(6, 4, DynMoeOptions(**options)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.threshold.fill_(threshold)
    return made


HIDDEN_TD = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRAINING = Context(training=True)


def test_the_gradient_is_that_of_the_margins_over_how_many_pass() -> None:
    router = gate()
    scores_TE = router.score(HIDDEN_TD, TRAINING).detach().requires_grad_()
    found = router.route(scores_TE, TRAINING)
    mix_TE = torch.randn(found.weight_TK.shape, dtype=torch.float64)
    (found.weight_TK * mix_TE).sum().backward()
    passes_TE = scores_TE.detach() > 0.5
    count_T1 = passes_TE.sum(1, keepdim=True).clamp(min=1)
    mine_TE = torch.zeros_like(mix_TE).scatter(1, scores_TE.argsort(dim=1, descending=True), mix_TE)
    torch.testing.assert_close(scores_TE.grad, passes_TE * mine_TE / count_T1)
    wanted_E = -(passes_TE * mine_TE / count_T1).sum(0) / 4  # the slope of a sigmoid at 0
    torch.testing.assert_close(router.threshold.grad, wanted_E)


def test_tokens_below_all_thresholds_go_nowhere_in_training_and_to_the_nearest_in_use() -> None:
    router = gate(threshold=9.0)
    assert (router(HIDDEN_TD, TRAINING).index_TK == -1).all()
    used = router(HIDDEN_TD)
    assert torch.equal(used.index_TK[:, 0], router.score(HIDDEN_TD, TRAINING).argmax(1))
    assert (used.index_TK[:, 1:] == -1).all() and (used.weight_TK[:, 0] == 1).all()


def test_in_use_a_token_that_passes_somewhere_needs_no_exception() -> None:
    """Though the expert it is most similar to has a threshold that it does not reach."""
    router = gate()
    scores_TE = torch.tensor([[0.9, 0.6, 0.55, 0.2]], dtype=torch.float64)
    with torch.no_grad():
        router.threshold[0] = 5.0
    assert router.route(scores_TE, Context()).index_TK.tolist() == [[-1, 1, 2, -1]]


def test_loss_by_hand_and_its_effect() -> None:
    router = gate(aux_loss=1.0)
    loss = router(HIDDEN_TD, TRAINING).aux_loss
    assert abs(loss.item() - 1) < 1e-5  # orthogonal, of norm 1
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 6, dtype=torch.float64))
    apart = 0.0
    for one in router.weight.detach():
        for two in router.weight.detach():
            apart += float(one @ two / one.norm() / two.norm() - float(one is two or bool((one == two).all()))) ** 2
    length = router.weight.norm(dim=1).mean().item()
    assert abs(router(HIDDEN_TD, TRAINING).aux_loss.item() - apart**0.5 - length) < 1e-9
