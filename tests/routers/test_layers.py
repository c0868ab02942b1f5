"""Architectures beside references in numpy, and what they claim: causality, what is shared, who learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from layer_reference import arrays, attended, feed_forward, gelu, layer_norm, routed, router, seeded
from scipy.special import softmax

from moectl.routers.layers.attention import MoaAttention, SwitchHeadAttention
from moectl.routers.layers.cross_token import CrossToken
from moectl.routers.layers.mmoe import Mmoe, Ple
from moectl.routers.layers.mot import MixtureOfTransformers
from moectl.routers.layers.mpoe import MpoExperts
from moectl.routers.layers.smlp import SparseMlp
from moectl.routers.layers.widenet import WideNet
from moectl.routers.protocol import Context
from moectl.routers.registry import ROUTERS
from moectl.routers.switchhead import SwitchHeadOptions

B, L, D, F, E, M = 2, 10, 8, 12, 4, 3
LABELS = Context(task_T=torch.arange(B * L) * 5 % M, modality_T=torch.arange(B * L) * 7 % M)
LEARNING = replace(LABELS, training=True)


def mpo_experts() -> MpoExperts:
    return MpoExperts(torch.randn(F, D), torch.randn(D, F), (2, 2, 2), (3, 2, 2), router(D, E), mask=0.0)


MADE: dict[str, Callable[[], Any]] = {
    "mot": lambda: MixtureOfTransformers(D, 2, F, M),
    "smlp": lambda: SparseMlp(D, F, 16, router(D, E)),
    "cross-token": lambda: CrossToken(D, L, F, F, router(2 * L, E, 1), router(D, E)),
    "widenet": lambda: WideNet(D, 2, F, 3, router(D, E)),
    "mpoe": mpo_experts,
    "mmoe": lambda: Mmoe(D, F, E, M),
    "ple": lambda: Ple(D, [F, 6], M, own=2, shared=2),
    "moa-attention": lambda: MoaAttention(D, 5, router(D, E)),
    "switchhead-attention": lambda: SwitchHeadAttention(D, 5, E, SwitchHeadOptions(top_k=2, heads=3)),
}
PARTIAL = {"smlp-partial": lambda: SparseMlp(D, F, 16, router(D, E), chunk_experts=3, prefix=0.3, chunks=4)}
ALL = list((MADE | PARTIAL).items())


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_layer_is_here() -> None:
    assert set(MADE) == {entry.name for entry in ROUTERS if entry.kind == "layer"}


@pytest.mark.parametrize(("name", "made"), ALL, ids=dict(ALL))
def test_every_parameter_learns(name: str, made: Callable[[], Any]) -> None:
    """But those of experts that no token met, which are slices; and losses are there in training alone."""
    layer = seeded(made)
    y_BLO, aux_loss = layer(hidden(), LEARNING)
    assert y_BLO.shape[:2] == (B, L) and aux_loss.shape == ()
    (y_BLO.square().sum() + aux_loss).backward()
    for parameter, value in layer.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 0, parameter
    _, unused = layer(hidden(), LABELS)
    assert unused == 0 and (aux_loss > 0) == (name not in ("mot", "mmoe", "ple", "switchhead-attention"))


@pytest.mark.parametrize(("name", "made"), ALL, ids=dict(ALL))
def test_later_tokens_matter_where_the_registry_says_so(name: str, made: Callable[[], Any]) -> None:
    entry = next(entry for entry in ROUTERS if entry.name == name.removesuffix("-partial"))
    layer, x_BLD = seeded(made), hidden()
    before, _ = layer(x_BLD, LABELS)
    moved = False
    for last in range(L):
        other = x_BLD.clone()
        other[:, last] = hidden(1)[:, last]
        after, _ = layer(other, LABELS)
        assert not torch.equal(before[:, last], after[:, last])
        moved |= not torch.allclose(before[:, :last], after[:, :last])
    assert moved != entry.causal


@pytest.mark.parametrize(("name", "made"), ALL, ids=dict(ALL))
def test_gradients_are_those_of_the_function(name: str, made: Callable[[], Any]) -> None:
    layer = seeded(made)

    def total(x_BLD: torch.Tensor) -> torch.Tensor:
        y_BLO, aux_loss = layer(x_BLD, LEARNING)
        return y_BLO.square().sum() + aux_loss

    assert torch.autograd.gradcheck(total, (hidden().requires_grad_(),), atol=1e-4, fast_mode=True), name


def test_mixture_of_transformers() -> None:
    layer, x_BLD = seeded(MADE["mot"]), hidden().numpy()
    p, modality = arrays(layer), LABELS.modality_T.view(B, L).numpy()
    y_BLD = np.zeros_like(x_BLD)
    for b in range(B):
        m = modality[b]
        query, key, value = (
            np.array([p[f"{name}_MDD"][m[t]] @ x_BLD[b, t] for t in range(L)]) for name in ("query", "key", "value")
        )
        context = attended(query, key, value, 2, causal=True)
        for t in range(L):
            out = p["out_MDD"][m[t]] @ context[t]
            h = x_BLD[b, t] + out / np.sqrt((out**2).mean() + 1e-5) * p["attention_norm_MD"][m[t]]
            gate = p["gate_MFD"][m[t]] @ h
            inner = p["down_MDF"][m[t]] @ (gate / (1 + np.exp(-gate)) * (p["up_MFD"][m[t]] @ h))
            y_BLD[b, t] = h + inner / np.sqrt((inner**2).mean() + 1e-5) * p["ffn_norm_MD"][m[t]]
    found, _ = layer(hidden(), LABELS)
    np.testing.assert_allclose(found.detach().numpy(), y_BLD, atol=1e-10)
    swapped = replace(LABELS, modality_T=(LABELS.modality_T + 1) % M)
    assert np.abs(layer(hidden(), swapped)[0].detach().numpy() - y_BLD).max() > 0.1  # the tolerance sees the modality


def test_heads_are_what_moa_chooses() -> None:
    layer, x_BLD = seeded(MADE["moa-attention"]), hidden().numpy()
    p, found = arrays(layer), layer(hidden(), LABELS)[0].detach().numpy()
    for b, t in np.ndindex(B, L):
        probability = softmax(p["router.weight"] @ x_BLD[b, t])
        key, value = x_BLD[b, : t + 1] @ p["key_WD"].T, x_BLD[b, : t + 1] @ p["value_WD"].T
        y = np.zeros(D)
        for e in np.argsort(-probability)[:2]:
            share = softmax(key @ (p["query_EWD"][e] @ x_BLD[b, t]) / np.sqrt(5))
            y += probability[e] * p["out_EDW"][e] @ (share @ value)
        np.testing.assert_allclose(found[b, t], y, atol=1e-12)


def test_switchhead_has_experts_in_values_and_outputs() -> None:
    layer, x_BLD, width = seeded(MADE["switchhead-attention"]), hidden().numpy(), 5
    p, found = arrays(layer), layer(hidden(), LABELS)[0].detach().numpy()

    def two_of(gate_SD: np.ndarray, head: int, row: np.ndarray) -> list[tuple[int, float]]:
        sigmoid = 1 / (1 + np.exp(-gate_SD[head * E : head * E + E] @ row))
        return [(head * E + e, sigmoid[e]) for e in np.argsort(-sigmoid)[:2]]

    for b, t in np.ndindex(B, L):
        y = np.zeros(D)
        for head in range(3):
            part = slice(head * width, (head + 1) * width)
            query, key = p["query"][part] @ x_BLD[b, t], x_BLD[b, : t + 1] @ p["key"][part].T
            value = [
                sum(w * p["value_SWD"][s] @ row for s, w in two_of(p["of_values.weight"], head, row))
                for row in x_BLD[b, : t + 1]
            ]
            attended_W = softmax(key @ query / np.sqrt(width)) @ np.array(value)
            y += sum(w * p["out_SDW"][s] @ attended_W for s, w in two_of(p["of_outputs.weight"], head, x_BLD[b, t]))
        np.testing.assert_allclose(found[b, t], y, atol=1e-12)


def test_widenet_is_one_block_with_many_norms() -> None:
    layer, depth = seeded(MADE["widenet"]), 3
    p, y_BLD = arrays(layer), hidden().numpy().copy()
    experts = feed_forward(p["experts.up_EFD"], p["experts.down_EDF"])
    for i in range(depth):
        for b in range(B):
            h_LD = layer_norm(y_BLD[b], p[f"attention_norms.{i}.weight"], p[f"attention_norms.{i}.bias"], 1e-6)
            query, key, value = (h_LD @ p[f"attention.{name}"].T for name in ("query", "key", "value"))
            y_BLD[b] += attended(query, key, value, 2, causal=False) @ p["attention.out"].T
            h_LD = layer_norm(y_BLD[b], p[f"expert_norms.{i}.weight"], p[f"expert_norms.{i}.bias"], 1e-6)
            y_BLD[b] += np.array([routed(row, p["router.weight"], experts) for row in h_LD])
    np.testing.assert_allclose(layer(hidden(), LABELS)[0].detach().numpy(), y_BLD, atol=1e-9)
    shared = sum(value.numel() for name, value in layer.named_parameters() if "norms" not in name)
    assert shared == sum(v.numel() for n, v in WideNet(D, 2, F, 9, router(D, E)).named_parameters() if "norms" not in n)


@pytest.mark.parametrize("name", ["smlp", "smlp-partial"])
def test_sparse_mlp(name: str) -> None:
    layer, x_BLD = seeded((MADE | PARTIAL)[name]), hidden().numpy()
    p, partial = arrays(layer), name == "smlp-partial"
    experts, seen = feed_forward(p["experts.up_EFD"], p["experts.down_EDF"]), 3 if partial else 0
    found = layer(hidden(), LABELS)[0].detach().numpy()
    for b in range(B):
        u_LD = gelu(layer_norm(x_BLD[b], p["chunk_norm.weight"], p["chunk_norm.bias"]) @ p["into"].T)
        z_LD = np.zeros((L, D))
        for chunk in range(4):
            part, expert, scale = slice(2 * chunk, 2 * chunk + 2), chunk, 1.0
            if partial:
                probability = softmax(p["chunk_experts.gate"] @ u_LD[:seen, part].mean(0))
                expert, scale = int(probability.argmax()), probability.max()
            mix, bias = p["chunk_experts.mix_ELL"][expert], p["chunk_experts.bias_EL"][expert]
            for t in range(seen, L):
                z_LD[t, part] = scale * (sum(mix[t, s] * u_LD[s, part] for s in range(t + 1)) + bias[t])
        h_LD = x_BLD[b] + z_LD @ p["out"].T
        rows = layer_norm(h_LD, p["token_norm.weight"], p["token_norm.bias"])
        y_LD = h_LD + np.array([routed(row, p["router.weight"], experts) for row in rows])
        np.testing.assert_allclose(found[b], y_LD, atol=1e-10)


def test_sparse_mlp_refuses_what_does_not_fit() -> None:
    for chunks, prefix in ((3, 0.0), (3, 0.2), (2, 0.0), (4, 1.0)):
        with pytest.raises(ValueError, match="chunks over 4 experts"):
            SparseMlp(D, F, 16, router(D, E), chunks=chunks, prefix=prefix)


def test_cross_token() -> None:
    layer, x_BLD = seeded(MADE["cross-token"]), hidden().numpy()
    p = arrays(layer)
    across = feed_forward(p["token_experts.up_EFD"], p["token_experts.down_EDF"])
    within = feed_forward(p["channel_experts.up_EFD"], p["channel_experts.down_EDF"])
    found = layer(hidden(), LABELS)[0].detach().numpy()
    for b in range(B):
        normed = layer_norm(x_BLD[b], p["token_norm.weight"], p["token_norm.bias"])
        columns = (normed @ p["narrow"].T).T @ p["lengthen"].T  # [D / 2, 2 L]
        mixed = np.array([routed(column, p["token_router.weight"], across, 1) for column in columns])
        h_LD = x_BLD[b] + (mixed @ p["shorten"].T).T @ p["widen"].T
        rows = layer_norm(h_LD, p["channel_norm.weight"], p["channel_norm.bias"])
        y_LD = h_LD + np.array([routed(row, p["channel_router.weight"], within) for row in rows])
        np.testing.assert_allclose(found[b], y_LD, atol=1e-10)


def test_multi_gate_experts() -> None:
    layer, x_BLD = seeded(MADE["mmoe"]), hidden().numpy()
    p, y_BLZO = arrays(layer), layer.all_tasks(hidden()).detach().numpy()
    for b, t, z in np.ndindex(B, L, M):
        gate = softmax(p["gate_ZED"][z] @ x_BLD[b, t])
        expert = [np.maximum(p["weight_EOD"][e] @ x_BLD[b, t] + p["bias_EO"][e], 0) for e in range(E)]
        np.testing.assert_allclose(y_BLZO[b, t, z], sum(gate[e] * expert[e] for e in range(E)), atol=1e-12)
    of_task, _ = layer(hidden(), LABELS)
    task = LABELS.task_T.view(B, L).numpy()
    for b, t in np.ndindex(B, L):
        np.testing.assert_array_equal(of_task[b, t].detach().numpy(), y_BLZO[b, t, task[b, t]])


def test_progressive_layered_extraction() -> None:
    layer, x_BLD, own, shared = seeded(MADE["ple"]), hidden().numpy(), 2, 2
    p, y_BLZO = arrays(layer), layer.all_tasks(hidden()).detach().numpy()
    for b, t in np.ndindex(B, L):
        streams = [x_BLD[b, t]] * (M + 1)
        for level in range(2):
            expert = []
            for e in range(M * own + shared):
                owner = e // own if e < M * own else M
                expert.append(np.maximum(p[f"weights.{level}"][e] @ streams[owner] + p[f"biases.{level}"][e], 0))
            after = []
            for z in range(M):
                seen = [*expert[z * own : (z + 1) * own], *expert[M * own :]]
                gate = softmax(p[f"task_gates.{level}"][z] @ streams[z])
                after.append(sum(g * each for g, each in zip(gate, seen, strict=True)))
            if level == 0:
                gate = softmax(p["shared_gates.0"] @ streams[M])
                after.append(sum(g * each for g, each in zip(gate, expert, strict=True)))
            streams = after
        np.testing.assert_allclose(y_BLZO[b, t], np.array(streams), atol=1e-12)


def test_a_task_of_ple_does_not_learn_from_anothers_experts_in_one_level() -> None:
    layer = seeded(lambda: Ple(D, [F], M, own=2, shared=1))
    layer.all_tasks(hidden())[:, :, 1].sum().backward()
    touched = layer.weights[0].grad.flatten(1).any(1).tolist()
    assert touched == [False, False, True, True, False, False, True]
