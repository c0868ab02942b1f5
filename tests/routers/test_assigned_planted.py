"""Errors planted in routers that assign, look up or let experts choose are seen by the cases that hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_assigned import CASES
from test_every_router import test_a_float64_reference_chooses_the_same as held

from moectl.routers import base, e3, expert_choice, hashing, kool, mod, moec, mone, prototyping, rectify, s_base, sam

PLANTED: dict[str, tuple[Any, str, Any]] = {
    "base": (base, "top", lambda scores_TE, _: scores_TE.argmin(1, keepdim=True)),
    "s-base": (s_base, "wide", lambda tensor: tensor.float()),
    "kool": (kool, "top", lambda scores_TE, _: scores_TE.sort(descending=True).indices[:, 1:2]),
    "hash": (hashing, "scrambled", lambda id_T, seed: id_T + seed),
    "multihash": (hashing, "scrambled", lambda id_T, seed: id_T * (seed + 1)),
    "mowe": (hashing, "NO_EXPERT", 0),
    "deepseek-v4-hash": (hashing, "scrambled", lambda id_T, _: id_T),
    "expert-choice": (expert_choice, "capacity", lambda *_: 5),
    "mod": (mod, "lengths", lambda _, like_T: torch.full_like(like_T, len(like_T) - 9)),
    "mone": (mone, "shares", lambda *_: [0.25] * 4),
    "prototyping": (prototyping, "capacity", lambda *_: 2),
    "moec": (moec, "top", lambda scores_TE, _: scores_TE.argmin(1, keepdim=True)),
    "rectify": (rectify, "places", lambda index_TK, *_: torch.zeros_like(index_TK)),
    "e3": (e3, "capacity", lambda *_: 2),
    "sam": (sam, "limited", lambda probability_TE, *_: probability_TE),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, wrong = PLANTED[name]
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        held(next(case for case in CASES if case.name == name))
