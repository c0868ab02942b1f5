"""Saliencies against a float64 brute force over tokens and experts that shares nothing with how they are measured."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruned_models import EXPERTS, loaded, made
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune import saliency
from moectl.compress.prune.layout import layout_of
from moectl.compress.prune.naee import best_subsets
from moectl.compress.prune.saliency import routed_scores, weight_scores
from moectl.compress.prune.scores import Scores, chosen
from moectl.errors import InputError
from moectl.layerwise.model import LayerwiseModel

TOKENS = np.random.default_rng(0).integers(3, 96, (4, 32))

Given = tuple[torch.Tensor, torch.Tensor]
"""What a layer's MoE block was given, and what it made of it, [T, D], in float64."""


def measured(source: Checkpoint) -> Any:
    return routed_scores(LayerwiseModel.open(source), TOKENS, layout_of(source))


def edited(source: Checkpoint, **values: torch.Tensor) -> Checkpoint:
    file = source.path / "model.safetensors"
    save_file(load_file(file) | values, file, {"format": "pt"})
    return Checkpoint.open(source.path)


def mixtral_inputs(source: Checkpoint) -> dict[int, torch.Tensor]:
    """The inputs [T, D] of the MoE block of each layer, from transformers' whole model in float64."""
    model = loaded(source, experts_implementation="eager").double()
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _m, given, n=number: seen.update({n: given[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(TOKENS))
    return seen


def mixtral_block(source: Checkpoint, layer: int) -> tuple[torch.Tensor, Any]:
    """The router's rows in float64, and each expert as a function, from the tensors on disk."""
    names = f"model.layers.{layer}.block_sparse_moe."

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(source.read(names + name).astype(np.float64))

    def expert(number: int, x_D: torch.Tensor) -> torch.Tensor:
        w1, w2, w3 = (read(f"experts.{number}.w{i}.weight") for i in (1, 2, 3))
        return w2 @ (silu(w1 @ x_D) * (w3 @ x_D))

    return read("gate.weight"), expert


def test_reap_ean_and_frequency_equal_a_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "PASS_TOKENS", 64)  # two passes, and blocks of rows that end in a token
    monkeypatch.setattr(saliency, "_ROWS", 33)
    source = made(tmp_path, "mixtral")
    scores = Scores(measured(source), {}, "")
    inputs = mixtral_inputs(source)
    for layer in range(3):
        router, expert = mixtral_block(source, layer)
        count, norms, gated = defaultdict(int), defaultdict(float), defaultdict(float)
        for x_D in inputs[layer]:
            top = (router @ x_D).softmax(-1).topk(2)
            for gate, number in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
                norm = float(expert(number, x_D).norm())
                count[number] += 1
                norms[number] += norm
                gated[number] += float(gate) * norm
        wanted = {
            "frequency": [count[e] for e in range(EXPERTS)],
            "ean": [norms[e] for e in range(EXPERTS)],
            "reap": [gated[e] / max(count[e], 1) for e in range(EXPERTS)],
        }
        for method, values in wanted.items():
            np.testing.assert_allclose(scores.saliency(method, layer, 6), values, rtol=2e-5, err_msg=method)
        assert not np.allclose(scores.saliency("reap", layer, 6), [norms[e] / count[e] / 2 for e in range(EXPERTS)])


def test_naee_finds_the_subset_that_a_brute_force_finds(tmp_path: Path) -> None:
    source = made(tmp_path, "mixtral")
    found = best_subsets(LayerwiseModel.open(source), TOKENS, layout_of(source), 6)
    inputs = mixtral_inputs(source)
    for layer in range(3):
        router, expert = mixtral_block(source, layer)
        outputs = torch.stack([torch.stack([expert(e, x) for e in range(EXPERTS)]) for x in inputs[layer]])

        def combined(kept: tuple[int, ...], x: Any = inputs[layer], y: Any = outputs, r: Any = router) -> torch.Tensor:
            logits = torch.full((len(x), EXPERTS), -torch.inf, dtype=torch.float64)
            logits[:, list(kept)] = x @ r[list(kept)].T
            top = logits.softmax(-1).topk(2)
            weight = top.values / top.values.sum(-1, keepdim=True)
            return (y.gather(1, top.indices[..., None].expand(-1, -1, y.shape[-1])) * weight[..., None]).sum(1)

        whole = combined(tuple(range(EXPERTS)))
        errors = {kept: float((combined(kept) - whole).norm()) for kept in combinations(range(EXPERTS), 6)}
        best = min(errors, key=errors.__getitem__)
        assert tuple(np.flatnonzero(found[layer]["best_6"])) == best


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text", "lfm2_moe"])
def test_naee_leaves_the_model_as_it_was_and_keeps_groups(family: str, tmp_path: Path) -> None:
    source = made(tmp_path, family)
    layout, model = layout_of(source), LayerwiseModel.open(source)
    before = model.logits(torch.from_numpy(TOKENS))
    for values in best_subsets(model, TOKENS, layout, 6).values():
        best = values["best_6"].reshape(layout.groups, -1)
        assert (best.sum(axis=1) == 6 // layout.groups).all()
    assert torch.equal(model.logits(torch.from_numpy(TOKENS)), before)


def test_aimer_equals_a_brute_force(tmp_path: Path) -> None:
    for family, name in (("olmoe", "model.layers.1.mlp.experts.{}.{}.weight"), ("gpt_oss", "")):
        source = made(tmp_path / family, family)
        got = weight_scores(layout_of(source))[1]["aimer"]
        for expert in range(EXPERTS):
            if name:
                parts = [source.read(name.format(expert, part)) for part in ("gate_proj", "up_proj", "down_proj")]
            else:
                parts = [
                    source.read(f"model.layers.1.mlp.experts.{part}")[expert] for part in ("gate_up_proj", "down_proj")
                ]
            flat = np.concatenate([part.ravel().astype(np.float64) for part in parts])
            aimer = np.abs(flat).sum() / np.sqrt(flat.size * (flat**2).sum())
            np.testing.assert_allclose(got[expert], 1 / aimer, rtol=1e-12)


def test_an_expert_that_is_never_routed_to_goes_first(tmp_path: Path) -> None:
    source = made(tmp_path, "deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.zeros(EXPERTS)
    bias[5] = -10.0
    scores = Scores(measured(edited(source, **{name: bias})), {}, "")
    for method in ("frequency", "ean", "reap"):
        saliency = scores.saliency(method, 1, 6)
        assert saliency[5] == 0 < np.delete(saliency, 5).min()
        assert 5 not in chosen(saliency, 6, 2)


def test_an_expert_of_zeros_goes_first(tmp_path: Path) -> None:
    source = made(tmp_path, "mixtral")
    name = "model.layers.2.block_sparse_moe.experts.3.w{}.weight"
    zeros = {name.format(i): torch.zeros(source.tensors[name.format(i)].shape) for i in (1, 2, 3)}
    assert np.argmin(weight_scores(layout_of(edited(source, **zeros)))[2]["aimer"]) == 3


@pytest.mark.parametrize("name", ["block_sparse_moe.experts.{}.w2.weight", "self_attn.q_proj.weight"])
def test_nan_in_a_weight_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    source = made(tmp_path, "mixtral")
    bad = {}
    for expert in range(EXPERTS if "{}" in name else 1):
        full = f"model.layers.1.{name.format(expert)}"
        bad[full] = torch.full(source.tensors[full].shape, torch.nan)
    source = edited(source, **bad)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor 'model\.layers\.1\..*weight' holds NaN"):
        measured(source)
    if "experts" in name:
        with pytest.raises(InputError, match=r"model\.safetensors: tensor 'model\.layers\.1\..*weight' holds NaN"):
            weight_scores(layout_of(source))
