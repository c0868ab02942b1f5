"""Reruns with masked experts, against MoE layers written out token by token in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from installed import installed
from synthetic import trace
from torch import Tensor

from moectl.errors import InputError, UsageError
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.routing.masking import Mask
from moectl.routing.masks import held, parse, reruns
from moectl.routing.points import find

torch.set_num_threads(1)

K = 3
MASKS = [
    Mask("kept", 1),
    Mask("kept", 2),
    Mask("kept", 3),
    Mask("removed", 1),
    Mask("removed", 3),
    parse("0:1,0:4-6,2:7"),
]


def log_probabilities(model: torch.nn.Module) -> list[np.ndarray]:
    """Of the tokens of two documents."""
    inputs = tiny_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].double()
    following = inputs["input_ids"][:, 1:, None]
    return list(logits.log_softmax(-1).gather(-1, following)[..., 0].numpy())


def by_hand(block: torch.nn.Module, layer: int, mask: Mask | None, normalise: bool) -> Callable[[Tensor], Tensor]:
    """Mixtral's and OLMoE's MoE layer for one token after another, with the mask as its definition says."""
    parts = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    router, gate_up, down = (part.detach().numpy() for part in parts)

    def token(x: np.ndarray) -> np.ndarray:
        logits = router @ x
        if mask and mask.kind == "removed":
            for e in sorted(range(len(logits)), key=lambda e: -logits[e])[: mask.r]:
                logits[e] = -np.inf
        if mask and mask.kind == "named":
            for e in mask.named.get(str(layer), ()):
                logits[e] = -np.inf
        p = np.exp(logits - logits.max())
        p /= p.sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e])[:K]
        kept = chosen[: mask.r] if mask and mask.kind == "kept" else chosen
        total = sum(p[e] for e in kept) if normalise else 1.0
        y = np.zeros_like(x)
        for e in kept:
            gate, up = np.split(gate_up[e] @ x, 2)
            y += p[e] / total * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
        return y

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).numpy()
        return torch.from_numpy(np.stack([token(x) for x in rows])).reshape(hidden.shape)

    return forward


@pytest.mark.parametrize(("family", "normalise"), [("mixtral", True), ("olmoe", False)])
def test_reruns_equal_layers_written_out_by_hand(family: str, normalise: bool) -> None:
    model = tiny_moe(family, num_experts_per_tok=K).double()
    model.set_experts_implementation("eager")  # the default has no float64
    base, found = reruns(find(model), MASKS, lambda: log_probabilities(model))
    losses = [base, *(rerun.loss for rerun in found)]
    for loss, mask in zip(losses, [None, *MASKS], strict=True):
        for layer, decoder in enumerate(model.model.layers):
            decoder.mlp.forward = by_hand(decoder.mlp, layer, mask, normalise)
        expected = -np.concatenate(log_probabilities(model)).mean()
        assert loss == pytest.approx(expected, abs=1e-6), "both families take the softmax in float32"
        for decoder in model.model.layers:
            decoder.mlp.forward = by_hand(decoder.mlp, 0, Mask("kept", 1), not normalise)
        assert abs(loss - -np.concatenate(log_probabilities(model)).mean()) > 1e-4, "a wrong mask is seen"
        for decoder in model.model.layers:
            del decoder.mlp.forward
    assert found[2].change == 0, "all that were chosen are kept"
    assert all(rerun.scaled == (("0", "1", "2") if normalise else ()) for rerun in found[:3])
    assert all(low <= rerun.change <= high for rerun in found for low, high in [rerun.change_interval])


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_moe("mixtral")
    before = [name for name, module in model.named_modules() if module._forward_pre_hooks or "forward" in vars(module)]
    expected = log_probabilities(model)
    with pytest.raises(UsageError):
        reruns(find(model), [Mask("removed", 1), Mask("removed", 7)], lambda: log_probabilities(model))
    after = [name for name, module in model.named_modules() if module._forward_pre_hooks or "forward" in vars(module)]
    assert after == before
    assert all(np.array_equal(a, b) for a, b in zip(expected, log_probabilities(model), strict=True))


FAMILIES = ["deepseek_v3", "glm4_moe", "gpt_oss", "dbrx", "qwen3_moe", "granitemoe", "phimoe", "jamba"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_masked_expert_is_chosen_whatever_stands_between_logits_and_choice(family: str) -> None:
    """Biases, groups, softmax after top-k: what the experts are given is read with a hook of the test's own."""
    model = tiny_moe(family)
    taps = find(model)
    inputs = tiny_inputs(model)
    given: list[tuple[Tensor, Tensor]] = []
    for tap in taps:
        _tell(tap.experts, given)

    def measure() -> list[np.ndarray]:
        given.clear()
        with torch.no_grad():
            model(**inputs)
        return [np.zeros(4), np.zeros(4)]

    layer = taps[-1].point.label
    named = Mask("named", named={layer: frozenset({0, 5})})
    reruns(taps, [named], measure)
    index_TK, weight_TK = given[-1]
    assert not (torch.isin(index_TK, torch.tensor([0, 5])) & (weight_TK != 0)).any()
    reruns(taps, [Mask("kept", 1)], measure)
    assert all(int((weight != 0).sum(-1).max()) == 1 for _, weight in given)
    measure()
    index_TK, weight_TK = given[0]
    heaviest = index_TK.gather(1, weight_TK.argmax(-1, keepdim=True))
    reruns(taps, [Mask("removed", 1)], measure)
    index_TK, weight_TK = given[0]
    assert not ((index_TK == heaviest) & (weight_TK != 0)).any()
    assert (weight_TK != 0).any(-1).all()


def _tell(experts: torch.nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    """Have a module append the index and the weights that reach it, past all hooks."""
    forward = experts.forward

    def told(*args: Tensor, **kwargs: Tensor) -> Tensor:
        index, weights = (*args, *kwargs.values())[1:3]
        given.append((index, weights))
        return forward(*args, **kwargs)

    experts.forward = told


@pytest.mark.parametrize(
    "family", installed("jetmoe", "llama4_text", "switch_transformers", "nllb-moe", "doge", "deepseek_v4")
)
def test_what_cannot_be_masked_is_refused(family: str) -> None:
    model = tiny_moe(family)
    inputs = tiny_inputs(model)

    def measure() -> list[np.ndarray]:
        with torch.no_grad():
            model(**inputs)
        return [np.zeros(4)]

    with pytest.raises(InputError, match="cannot be run with a mask"):
        reruns(find(model), [Mask("removed", 1)], measure)


def test_masks_are_read_as_they_are_written() -> None:
    assert parse("kept:2") == Mask("kept", 2)
    assert parse("removed:1") == Mask("removed", 1)
    assert parse("3:17, 3:4-6,encoder 1:0").named == {"3": frozenset({17, 4, 5, 6}), "encoder 1": frozenset({0})}
    for mask in MASKS:
        assert parse(mask.label) == mask


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="keptrmovd0123456789:,- ", max_size=14))
def test_any_text_is_a_mask_or_a_usage_error(text: str) -> None:
    try:
        mask = parse(text)
    except UsageError:
        return
    assert parse(mask.label) == mask


@pytest.mark.parametrize(
    ("text", "message"), [("9:0", "layer 9"), ("0:8", "expert 8"), ("0:0-6", "too few"), ("kept:3", "too few")]
)
def test_a_mask_that_does_not_fit_the_model_is_refused_before_it_runs(text: str, message: str) -> None:
    model = tiny_moe("mixtral")
    with pytest.raises(UsageError, match=message):
        reruns(find(model), [parse(text)], lambda: log_probabilities(model))


def test_the_estimate_is_the_share_of_the_weights() -> None:
    recorded = trace(layers=2, experts=8, top_k=3)
    for routed, estimate in zip(recorded.layers, held(recorded), strict=True):
        for r in range(3):
            shares = [
                sum(sorted(map(float, row), reverse=True)[: r + 1]) / sum(map(float, row)) for row in routed.weight_TK
            ]
            assert estimate.share_K[r] == pytest.approx(np.mean(shares))
    assert held(trace(weights=False)) == []
