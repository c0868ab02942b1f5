"""How many experts a router says work on a token, against how many do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moectl.integrations.routed.held import HeldRouter, Passing
from moectl.routers.longcat import LongCat, LongCatOptions
from moectl.routers.moe_plus_plus import MoePlusPlus, MoePlusPlusOptions
from moectl.routers.protocol import NO_EXPERT, Context
from moectl.routers.registry import find

CHOOSING: dict[str, dict[str, Any]] = {
    "adaptive-mixtures": {},
    "e3": {"members": 2, "top_k": 3},
    "expert-choice": {"top_k": 2, "capacity_factor": 1.5},
    "inkling": {"top_k": 3, "shared_experts": 2},
    "mixtral": {"top_k": 3},
    "mod": {"share": 0.25},
    "peer": {"heads": 2, "top_k": 3},
    "sparse-is-enough": {"block": 4},
    "switchhead": {"heads": 3, "top_k": 2},
}


@pytest.mark.parametrize("name", CHOOSING)
def test_as_many_work_on_a_token_as_is_said(name: str) -> None:
    kind = find(name).load()
    torch.manual_seed(0)
    router = kind(8, 1 if name == "mod" else 16, kind.Options(**CHOOSING[name]))
    found = router(torch.randn(64, 8), Context())
    assert (found.index_TK != NO_EXPERT).sum() / 64 == router.active


def test_longcat_says_how_many_its_bias_aims_at() -> None:
    """A load by which eight of twelve choices compute moves no bias."""
    router = LongCat(None, 512)
    assert router.active == 8
    load_E = torch.cat([torch.full((512,), 8 * 256), torch.full((256,), 4 * 512)])
    router.after_step(load_E)
    torch.testing.assert_close(router.bias, torch.zeros_like(router.bias))
    assert LongCat(None, 16, LongCatOptions(zero_experts=0)).active == 12


def test_moe_plus_plus_says_what_it_has_room_for() -> None:
    router = MoePlusPlus(None, 4, MoePlusPlusOptions(capacity_factor=1.0, tau=0.5, aux_loss=0.0))
    scores_TE = torch.tensor([[9.0, 8, 0, 0, 0, 0, 0, 0]]).expand(3000, -1)
    room = (router.route(scores_TE, Context(training=True)).index_TK == 0).sum()
    assert 4 * room / 3000 == pytest.approx(router.active, rel=1e-9) and router.active == pytest.approx(2 * 2 / 6)


def test_the_share_of_the_experts_work_is_of_those_that_compute() -> None:
    held = HeldRouter()
    held.hold(LongCat(None, 32), Passing())
    assert held.share(128) == 8 / 32
