"""The probe: what models write, on models whose next token is known because it was written into their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moectl.evaluation.probe import GIVEN, WRITTEN, Probe, probe, repeated, surprise, written

TOKENS = 32


def successor_model(factor: int, step: int, sharpness: float = 1.0) -> Any:
    """A Llama that predicts `factor * token + step`, whatever came before: its layers add nothing."""
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=TOKENS,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(TOKENS))
        model.lm_head.weight.zero_()
        for token in range(TOKENS):
            model.lm_head.weight[(factor * token + step) % TOKENS, token] += sharpness
    return model


def batches() -> dict[str, list[np.ndarray]]:
    """Rows of tokens that follow 5 * t + 1 (all 32 in one cycle), one in five of them wrong."""
    random = np.random.default_rng(0)
    row_BL = np.zeros((10, 100), np.int64)
    for place in range(1, 100):
        wrong = random.random(10) < 0.2
        row_BL[:, place] = np.where(wrong, random.integers(0, TOKENS, 10), (5 * row_BL[:, place - 1] + 1) % TOKENS)
    return {"cycle": [row_BL[:6], row_BL[6:]]}


def probed(changed: Any) -> Probe:
    return probe(lambda: successor_model(5, 1), lambda: changed, batches())["cycle"]


def test_a_model_like_the_original_is_not_broken() -> None:
    same, near = probed(successor_model(5, 1)), probed(successor_model(5, 1, sharpness=0.7))
    assert not same.broken and same.loss_before == same.loss_after and same.repeated_before == same.repeated_after
    assert not near.broken and near.loss_after > near.loss_before
    assert same.surprise_before == same.surprise_after < same.loss_before, (
        "the likeliest text is likelier than real text"
    )


def test_a_model_that_writes_one_word_forever_is_broken() -> None:
    found = probed(successor_model(0, 7))
    assert "repetition" in found.broken and found.repeated_after == pytest.approx((WRITTEN - 4) / (WRITTEN - 3))


def test_a_model_that_writes_what_the_original_would_not_is_broken() -> None:
    found = probed(successor_model(13, 5))  # as long a cycle: nothing repeats sooner
    assert "less likely" in found.broken and found.repeated_after == pytest.approx(found.repeated_before, abs=0.05)


def test_repetition_is_measured_against_what_the_original_does() -> None:
    assert Probe(2.0, 2.0, 0.1, 0.56, 1.0, 1.0).broken and not Probe(2.0, 2.0, 0.1, 0.54, 1.0, 1.0).broken
    assert Probe(2.0, 2.0, 0.8, 0.91, 1.0, 1.0).broken and not Probe(2.0, 2.0, 0.8, 0.89, 1.0, 1.0).broken


def test_a_loss_that_is_nan_is_broken() -> None:
    assert Probe(1.0, 1.0, 0.0, 0.0, 1.0, float("nan")).broken


def test_written_is_the_argmax_and_surprise_its_loss() -> None:
    model, given_NP = successor_model(5, 1), np.full((2, GIVEN), 3)
    token, wanted = 3, []
    for _ in range(WRITTEN):
        token = (5 * token + 1) % TOKENS
        wanted.append(token)
    text_NG = written(model, given_NP)
    assert text_NG.tolist() == [wanted, wanted]
    # The final norm makes a one-hot sqrt(H) long, so the right token has that logit and the others 0.
    logit = TOKENS**0.5 / (1 + TOKENS * model.config.rms_norm_eps) ** 0.5
    expected = np.log(np.exp(logit) + TOKENS - 1) - logit
    assert surprise(model, given_NP, text_NG) == pytest.approx(expected, rel=1e-5)


def test_repeated_counts_4_grams_that_came_before() -> None:
    assert repeated(np.array([[1, 2, 3, 4, 5, 6, 7]])) == 0
    assert repeated(np.array([[1, 1, 1, 1, 1, 1], [1, 2, 3, 1, 2, 3]])) == pytest.approx(2 / 6)
    assert repeated(np.array([[1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 5)
