"""Divergence of two models: brute force in float64, nothing to itself, planted changes seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moectl.evaluation import divergence as module
from moectl.evaluation.change import packed
from moectl.evaluation.divergence import MEAN, Divergence, divergence
from moectl.families.tiny_moe import tiny_moe

EXACT = 1e-5
"""Of a KL: logits pass through float32 on their way to the file."""


def model(scale: float = 1.0, seed: int = 0) -> Any:
    """A small Mixtral, the weights of its last layer's experts multiplied."""
    made = tiny_moe("mixtral", seed=seed).eval()
    with torch.no_grad():
        made.model.layers[-1].mlp.experts.down_proj *= scale
    return made


def tokens() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"one": random.integers(0, 96, (4, 24)), "two": random.integers(0, 96, (3, 17))}


def diverged(after: Any, seed: int = 0) -> Divergence:
    return divergence(model, lambda: after, tokens(), seed)


def test_a_model_does_not_differ_from_itself() -> None:
    found = diverged(model())
    assert set(found.domains) == {"one", "two", MEAN}
    assert all(drift.kl == 0 and drift.same_next == 1 for drift in found.domains.values())
    assert len(found.rerouted) == 3 and set(found.rerouted.values()) == {0.0}


@pytest.mark.parametrize("chunk", [module.CHUNK_NUMBERS, 200])
def test_the_divergence_is_that_of_plain_float64(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    before, after = model(), model(1.3)
    found = divergence(lambda: before, lambda: after, tokens())
    for domain, token_BL in tokens().items():
        with torch.no_grad():
            p, q = (each(torch.from_numpy(token_BL)).logits.double().softmax(-1) for each in (before, after))
        kl = (p * (p / q).log()).sum(-1).mean().item()
        same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        drift = found.domains[domain]
        assert kl > 1e-3, "there is something to measure"
        assert drift.kl == pytest.approx(kl, rel=EXACT)
        assert drift.kl != pytest.approx((q * (q / p).log()).sum(-1).mean().item(), rel=EXACT), "planted: turned round"
        assert drift.same_next == pytest.approx(same) and drift.tokens == token_BL.size
        assert drift.kl_interval is not None and drift.kl_interval[0] < kl < drift.kl_interval[1]
    mean = found.domains[MEAN]
    assert mean.kl == pytest.approx((found.domains["one"].kl + found.domains["two"].kl) / 2)
    assert mean.kl != pytest.approx(
        sum(each.kl * each.tokens for name, each in found.domains.items() if name != MEAN) / mean.tokens, rel=EXACT
    ), "domains, not tokens, count the same"


def test_rerouting_is_seen_where_it_happens() -> None:
    turned, mixed = model(), model()
    with torch.no_grad():
        gate = turned.model.layers[1].mlp.gate.weight
        gate.copy_(gate.roll(1, 0))  # every token takes the neighbours of the experts it took
        mixed.model.layers[2].mlp.gate.weight.mul_(1.7)
    found = diverged(turned)
    first, second, third = found.rerouted.values()
    assert first == 0, "nothing changed before it"
    assert second > 0.5
    assert third > 0, "what comes after it is given other hidden states"
    same = diverged(mixed)
    assert set(same.rerouted.values()) == {0.0}, "surer routers take the same experts"
    assert same.domains[MEAN].kl > 0


def test_rerouting_equals_sets_counted_by_hand() -> None:
    before, after = model(), model(seed=1)
    found = divergence(lambda: before, lambda: after, tokens())
    chosen: list[list[set[int]]] = []
    for each in (before, after):
        sets: list[set[int]] = []
        hook = each.model.layers[0].mlp.experts.register_forward_pre_hook(
            lambda _module, given, sets=sets: sets.extend(set(row) for row in given[1].tolist())
        )
        with torch.no_grad():
            for token_BL in tokens().values():
                each(torch.from_numpy(token_BL))
        hook.remove()
        chosen.append(sets)
    changed = sum(one != other for one, other in zip(*chosen, strict=True)) / len(chosen[0])
    assert found.rerouted["model.layers.0.mlp.experts"] == pytest.approx(changed)


def test_models_come_back_as_they_were() -> None:
    after = model().train()
    diverged(after)
    assert after.training
    assert not any(part._forward_pre_hooks for part in after.modules())


def test_sequences_are_the_documents_one_after_the_other() -> None:
    found = packed({"long": [[1, 2, 3], [4], [5, 6, 7, 8]], "short": [[9]]}, end=0, length=4, tokens=9)
    assert found["long"].tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]
    assert found["short"].tolist() == [[9, 0]]
