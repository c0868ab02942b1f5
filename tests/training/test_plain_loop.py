"""The loop learns, repeats itself bit by bit, follows its schedule, and stops where it must."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import train
from transformers import LlamaConfig, LlamaForCausalLM

from moectl.errors import CheckFailed, InputError

VOCABULARY = 32


def tiny_llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def random_batches(seed: int = 0) -> Iterator[np.ndarray]:
    ids = np.random.default_rng(seed)
    while True:
        yield ids.integers(0, VOCABULARY, (2, 16))


def test_one_batch_is_learnt_by_heart() -> None:
    batch = next(random_batches())
    losses = train(tiny_llama(), repeat(batch), steps=60, learning_rate=1e-2, warmup=5)
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05), "at first it knows nothing"
    assert losses[-1] < 0.3


def test_the_same_batches_give_the_same_weights() -> None:
    models = [tiny_llama() for _ in range(2)]
    losses = [train(model, random_batches(), steps=5, learning_rate=1e-2) for model in models]
    assert losses[0] == losses[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_adamw_with_clipping_decay_on_matrices_and_a_cosine() -> None:
    """Algorithm 2 of AdamW (arXiv 1711.05101), written out."""
    rate, decay, clip, beta1, beta2 = 1e-2, 0.5, 0.1, 0.9, 0.95
    batches = list(islice(random_batches(), 4))
    model, reference = tiny_llama(), tiny_llama()
    train(model, batches, steps=4, learning_rate=rate, weight_decay=decay, clip=clip)

    weights = list(reference.parameters())
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step, batch in enumerate(batches):
        tokens = torch.from_numpy(batch)
        gradients = torch.autograd.grad(reference(input_ids=tokens, labels=tokens).loss, weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > clip
        now = rate * (1 + math.cos(math.pi * step / 4)) / 2
        for weight, gradient, m, v in zip(weights, gradients, first, second, strict=True):
            gradient = gradient * clip / norm
            m.copy_(beta1 * m + (1 - beta1) * gradient)
            v.copy_(beta2 * v + (1 - beta2) * gradient**2)
            unbiased = (v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
            shrunk = weight * (1 - now * decay) if weight.ndim == 2 else weight
            weight.data = shrunk - now * m / (1 - beta1 ** (step + 1)) / unbiased
    for (name, trained), expected in zip(model.named_parameters(), weights, strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-3, atol=2e-5, msg=name)


def test_the_learning_rate_warms_up_from_zero_and_comes_down_to_zero() -> None:
    model = tiny_llama()
    weight = model.model.norm.weight
    moved, before = [], weight.detach().clone()

    def on_step(_step: int, _loss: float) -> None:
        nonlocal before
        moved.append((weight.detach() - before).abs().max().item())
        before = weight.detach().clone()

    train(model, random_batches(), steps=40, learning_rate=1e-2, warmup=10, on_step=on_step)
    assert moved[0] == 0
    assert 3e-3 < max(moved) < 3e-2
    assert moved[1] < 0.3 * max(moved) and moved[-1] < 0.05 * max(moved)


def test_on_step_hears_of_every_step() -> None:
    heard: list[tuple[int, float]] = []
    losses = train(tiny_llama(), random_batches(), steps=3, learning_rate=0.0, on_step=lambda *step: heard.append(step))
    assert heard == list(zip([1, 2, 3], losses, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_lost(bad: float) -> None:
    model = tiny_llama()

    def spoil(step: int, _loss: float) -> None:
        if step == 2:
            with torch.no_grad():
                model.lm_head.weight[3] = bad

    with pytest.raises(CheckFailed, match="became nan at step 3 of 9"):
        train(model, random_batches(), steps=9, learning_rate=1e-3, on_step=spoil)
    assert all(weight.isfinite().all() for name, weight in model.named_parameters() if name != "lm_head.weight")


def test_data_that_ends_too_early_says_when() -> None:
    with pytest.raises(InputError, match="ended after 2 of 5"):
        train(tiny_llama(), islice(random_batches(), 2), steps=5, learning_rate=1e-3)


def test_frozen_parameters_stay() -> None:
    model = tiny_llama()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    train(model, random_batches(), steps=2, learning_rate=1e-2)
    assert torch.equal(frozen, before)
