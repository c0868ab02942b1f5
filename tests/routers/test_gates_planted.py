"""Errors planted in gates are seen by the cases that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_gates import CASES
from test_every_router import test_a_float64_reference_chooses_the_same as held

from moectl.routers import adaptive_mixtures, dselect_k, dynmoe, evo_moe, peer, remoe, stable_moe, top_p, x_moe, yuan
from moectl.routers.choice import choose

PLANTED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "adaptive-mixtures": (adaptive_mixtures, "ranked", lambda weight_TE: (weight_TE.argsort(dim=-1), weight_TE)),
    "dselect-k": (dselect_k, "smooth_step", lambda value, gamma: (value / gamma + 0.5).clamp(0, 1)),
    "stable-moe": (stable_moe, "capacity", lambda *_: 1),
    "evo-moe": (evo_moe, "choose", lambda scores_TE, top_k: choose(-scores_TE, top_k)),
    "yuan": (yuan, "top", lambda scores_TE, top_k: scores_TE.argsort(dim=-1)[:, -top_k:]),
    "x-moe": (x_moe, "normalize", lambda tensor, **_: tensor),
    "tutel-cosine": (x_moe, "normalize", lambda tensor, **_: torch.nn.functional.normalize(tensor, p=1, dim=-1)),
    "peer": (peer, "GATES", {"softmax": torch.sigmoid}),
    "remoe": (remoe, "wide", lambda tensor: tensor.abs()),
    "dynmoe": (dynmoe, "normalize", lambda tensor, **_: tensor - tensor.mean()),
    "top-p": (top_p, "pad", lambda tensor, _: torch.nn.functional.pad(tensor, (0, 1), value=9.0)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    held(case)
    module, attribute, wrong = PLANTED[name]
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        held(case)
