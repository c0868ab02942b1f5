"""Log-probabilities of documents are those of transformers in float64, token by token; ensembles are Bayes' rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moectl.evaluation.ensemble import ensemble_log_probabilities
from moectl.families.tiny import tiny_model
from moectl.layerwise.scoring import log_probabilities

PREFIX = 2
DOCUMENTS = [np.random.default_rng(size).integers(0, 128, size).tolist() for size in (1, 7, 19, 16, 0, 33, 8)]


def tiny_mixtral() -> Any:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2, seed=3)
    model.set_experts_implementation("eager")  # the only one that runs in float64
    return model


def distributions(model: Any, document: list[int], length: int) -> list[np.ndarray]:
    """The next-token probabilities before each token, in float64, from one call per token on what it may look at."""
    result = []
    for place in range(len(document)):
        start = place // length * length
        context = [document[start - 1] if start else PREFIX, *document[start:place]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1]
        result.append(logits.softmax(-1).numpy())
    return result


@pytest.fixture(scope="module", params=["llama", "qwen3", "mixtral"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_mixtral() if request.param == "mixtral" else tiny_model(request.param)


@pytest.mark.parametrize("length", [5, 16, 64])
def test_every_token_is_predicted_once_as_transformers_does(model: Any, length: int) -> None:
    found = log_probabilities(model.float(), DOCUMENTS, PREFIX, length)
    exact = model.double()
    for document, log_p in zip(DOCUMENTS, found, strict=True):
        expected = [np.log(p[token]) for p, token in zip(distributions(exact, document, length), document, strict=True)]
        assert log_p.dtype == np.float64 and log_p.shape == (len(document),)
        assert np.allclose(log_p, expected, atol=1e-5)
        if len(document) > 1:
            assert not np.allclose(np.roll(log_p, 1), expected, atol=1e-2), "a shift by one would be noticed"


def test_neither_padding_nor_company_changes_a_document(model: Any) -> None:
    model.float()
    together = log_probabilities(model, DOCUMENTS, PREFIX, 16)
    alone = [log_probabilities(model, [document], PREFIX, 16)[0] for document in DOCUMENTS]
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    first = log_probabilities(model, DOCUMENTS, PREFIX, 16)
    assert model.training
    for one, other in zip(first, log_probabilities(model, DOCUMENTS, PREFIX, 16), strict=True):
        assert np.array_equal(one, other), "no dropout"


@pytest.mark.parametrize("weights", ["uniform", "posterior"])
def test_an_ensemble_is_its_mixture_by_hand(weights: Any) -> None:
    """Whole distributions of two models, mixed by a loop that updates its weights after every token."""
    models = [tiny_model("llama", seed=seed).double() for seed in (0, 1)]
    document = DOCUMENTS[2]
    whole = [distributions(model, document, 64) for model in models]
    weight = np.full(2, 0.5)
    expected = []
    for place, token in enumerate(document):
        mixture = sum(w * p[place] for w, p in zip(weight, whole, strict=True))
        assert mixture.sum() == pytest.approx(1.0)
        expected.append(np.log(mixture[token]))
        if weights == "posterior":
            weight = weight * [p[place][token] for p in whole]
            weight /= weight.sum()
    log_p = np.stack([log_probabilities(model.float(), [document], PREFIX, 64)[0] for model in models])
    assert np.allclose(ensemble_log_probabilities(log_p, weights), expected, atol=1e-5)


def test_a_posterior_finds_the_model_that_knows_the_text_and_never_overflows() -> None:
    log_p = np.log(np.stack([np.full(5000, 1e-30), np.full(5000, 0.5)]))
    found = ensemble_log_probabilities(log_p, "posterior")
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(np.log(0.25)) and np.allclose(found[1:], np.log(0.5))
    assert np.allclose(ensemble_log_probabilities(log_p, "uniform"), np.log(0.25))
    assert ensemble_log_probabilities(np.empty((2, 0)), "posterior").shape == (0,)
