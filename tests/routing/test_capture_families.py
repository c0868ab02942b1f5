"""Every MoE family of the installed transformers: what is captured is what its experts receive, and nothing changes.

Families are found in the installed source, so one that a new release adds is walked without being asked, and passes,
or fails under its name. What experts receive is seen by spies in place of their `forward`, or of the modules inside
them, that share nothing with the hooks: as a matrix of weights [T, E], zero where a token does not go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from installed import installed
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.families.backend import experts_classes
from moectl.families.tiny_moe import model_types, tiny_inputs, tiny_moe
from moectl.routing.adapters import ADAPTERS
from moectl.routing.capture import Capture, Seen
from moectl.routing.check import Checked, check
from moectl.routing.points import find
from moectl.routing.tap import Tap

REFUSED = {"vitpose_backbone": "experts are chosen by data set, without a router"}
"""Families with experts whose routing cannot be captured, and why."""

ADAPTED = {
    *("deepseek_v4", "diffusion_gemma", "doge", "ernie4_5_vl_moe", "gemma4", "jetmoe", "llama4", "longcat_flash"),
    *("nllb_moe", "switch_transformers", "zaya"),
}
"""Families that need an adapter. MXFP4 gpt-oss does too; it needs a GPU's kernels to run and is tested beside this."""

FAMILIES = [each for each in experts_classes() if each not in REFUSED and installed(*model_types(each))]

Spy = Callable[[Tap, nn.Module], Callable[[], Tensor]]
"""Watches one point of a model; then gives the weights [T, E] that its experts worked with."""


def dense(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """[T, E] of [T, K]; what went nowhere, or to an expert that computes nothing, counts nothing."""
    there_TK = (index_TK >= 0) & (index_TK < experts)
    flat = torch.zeros(len(index_TK), experts)
    return flat.scatter_add(1, index_TK.where(there_TK, 0), weight_TK.float().where(there_TK, 0))


def replaced(module: Any, keep: list[Any]) -> None:
    """Have `module.forward` note its arguments before it does what it did."""
    forward = module.forward

    def noted(*given: Any, **named: Any) -> Any:
        keep.append((*given, *named.values()))
        return forward(*given, **named)

    module.forward = noted


def spy_on_arguments(tap: Tap, _model: nn.Module) -> Callable[[], Tensor]:
    calls: list[Any] = []
    replaced(tap.experts, calls)

    def seen() -> Tensor:
        ((_hidden, index_TK, weight_TK),) = calls
        return dense(index_TK, weight_TK, tap.point.num_experts - tap.point.null_experts)

    return seen


def spy_on_switch(tap: Tap, _model: nn.Module) -> Callable[[], Tensor]:
    """The tokens that each expert, a module of its own, is given: recognised by their hidden states."""
    whole: list[Any] = []
    replaced(tap.experts, whole)
    calls: list[list[Any]] = [[] for _ in range(tap.point.num_experts)]
    for number, each in enumerate(calls):
        replaced(tap.experts[f"expert_{number}"], each)  # type: ignore[index]

    def seen() -> Tensor:
        hidden_TD, _one_hot, weight_T1 = whole[0]
        received_TE = torch.zeros(len(hidden_TD), len(calls))
        for number, each in enumerate(calls):
            for (rows_RD,) in each:
                received_TE[:, number] += (hidden_TD[:, None] == rows_RD[None]).all(-1).any(1) * weight_T1[:, 0]
        return received_TE

    return seen


def spy_on_nllb(tap: Tap, _model: nn.Module) -> Callable[[], Tensor]:
    calls: list[Any] = []
    replaced(tap.experts, calls)
    return lambda: calls[0][2]


def spy_on_llama4(tap: Tap, model: nn.Module) -> Callable[[], Tensor]:
    """By how much the input of each expert is longer than the token's hidden state."""
    block: Any = model.get_submodule(tap.point.name.rpartition(".")[0])
    hidden: list[Any] = []
    scaled: list[Any] = []
    replaced(block.router, hidden)
    replaced(block.experts, scaled)

    def seen() -> Tensor:
        hidden_TD = hidden[0][0]
        scaled_ETD = scaled[0][0].view(tap.point.num_experts, *hidden_TD.shape)
        return (scaled_ETD.norm(dim=-1) / hidden_TD.norm(dim=-1)).T

    return seen


def spy_on_jetmoe(tap: Tap, model: nn.Module) -> Callable[[], Tensor]:
    """The rows that each expert's projection is given, told apart by their hidden states, and the router's gates."""
    block: Any = model.get_submodule(tap.point.name.rpartition(".")[0])
    hidden: list[Any] = []
    given: list[Any] = []
    outputs: list[Any] = []
    replaced(block.router, hidden)
    block.router.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    replaced(block.input_linear, given)

    def seen() -> Tensor:
        hidden_TD, (rows_SD, sizes) = hidden[0][0], given[0]
        received_TE, start = torch.zeros(len(hidden_TD), len(sizes)), 0
        for number, size in enumerate(sizes):
            for row in range(start, start + size):
                received_TE[(hidden_TD == rows_SD[row]).all(-1), number] = outputs[0][2][row]
            start += size
        return received_TE

    return seen


def spy_on_doge(tap: Tap, _model: nn.Module) -> Callable[[], Tensor]:
    """The rows that are looked up; the weights are what turns their outputs into the layer's, by least squares."""
    layer: Any = tap.router
    looked_up: list[Any] = []
    outputs: list[Any] = []
    hidden: list[Any] = []
    replaced(layer.down_embed, looked_up)
    replaced(layer, hidden)
    layer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))

    def seen() -> Tensor:
        index_TK, h = looked_up[0][0], hidden[0][0]
        shared = layer.down_proj(layer.act_fn(layer.gate_proj(h)) * layer.up_proj(h))
        routed_TD, h_TD = (outputs[0] - shared).flatten(0, -2), h.flatten(0, -2)
        inner_TK = layer.act_fn(torch.einsum("tkd,td->tk", layer.down_embed.weight[index_TK], h_TD))
        basis_TDK = (inner_TK[..., None] * layer.up_embed.weight[index_TK]).transpose(1, 2)
        weight_TK = torch.linalg.lstsq(basis_TDK, routed_TD[..., None]).solution[..., 0]
        return dense(index_TK, weight_TK, tap.point.num_experts)

    return seen


SPIES: dict[str, Spy] = {
    "DogeCDMoE": spy_on_doge,
    "JetMoeTopKGating": spy_on_jetmoe,
    "Llama4Router": spy_on_llama4,
    "NllbMoeExperts": spy_on_nllb,
    "SwitchTransformersExperts": spy_on_switch,
}
"""By the class that is watched; the others' arguments say it all."""

TOLERANCE = {"DogeCDMoE": 1e-3, "Llama4Router": 1e-5}
"""Where weights are worked out from outputs or from lengths; elsewhere they are equal."""


def watched_class(tap: Tap) -> str:
    return type(tap.experts or tap.router).__name__


def captured(model: Any) -> tuple[Checked, tuple[Seen, ...], dict[str, Tensor], list[Tensor]]:
    """What the check says; of a pass over 2 x 16 tokens what is seen and what spies saw; outputs without and with."""
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs)[0]
        checked = check(model, lambda: model(**inputs)[0])
        spies = {}
        for tap in checked.taps:
            if tap.point.name not in spies:
                spies[tap.point.name] = SPIES.get(watched_class(tap), spy_on_arguments)(tap, model)
        with Capture(model, taps=checked.taps) as capture:
            watched = model(**inputs)[0]
            seen = capture.take()
        return checked, seen, {name: spy() for name, spy in spies.items()}, [plain, watched]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_is_what_experts_receive(family: str, record_property: Callable[[str, Any], None]) -> None:
    """Ids, weights and scores of every point, and the same output bit for bit with hooks and without."""
    adapted = set()
    for model_type in model_types(family):
        model = tiny_moe(model_type)
        checked, seen, received, (plain, watched) = captured(model)
        assert torch.equal(plain, watched)
        for tap, each in zip(checked.taps, seen, strict=True):
            point, name = tap.point, watched_class(tap)
            adapted |= {name} & ADAPTERS.keys()
            assert each.index_TK.shape == each.weight_TK.shape == (32, point.top_k)
            found_TE = dense(each.index_TK, each.weight_TK, received[point.name].shape[1])
            torch.testing.assert_close(found_TE, received[point.name].float(), rtol=0, atol=TOLERANCE.get(name, 0.0))
            assert each.index_TK.unique().numel() >= 2, "several experts are at work"
            check_scores(tap, each)
    assert bool(adapted) == (family in ADAPTED)
    record_property("capture families", 1)


def check_scores(tap: Tap, seen: Seen) -> None:
    """Scores say what they are said to be, and decide alone where they are said to."""
    point = tap.point
    assert (seen.score_TE is None) == (point.score_kind == "none")
    if seen.score_TE is None:
        return
    assert seen.score_TE.shape == (32, point.num_experts)
    if point.score_kind == "probabilities":
        torch.testing.assert_close(seen.score_TE.sum(-1), torch.ones(32))
    else:
        assert seen.score_TE.sum(-1).std() > 0
    sent_T = (seen.index_TK >= 0).all(-1)
    top_TK = seen.score_TE.topk(point.top_k, dim=-1).indices.sort(-1).values
    if point.selects:
        assert torch.equal(top_TK[sent_T], seen.index_TK.sort(-1).values[sent_T])
    if tap.ordered:
        assert torch.equal(seen.score_TE.argmax(-1)[sent_T], seen.index_TK[sent_T, 0])


def test_the_refused_families_are_refused() -> None:
    """They have no tap, and the error says what a tap needs."""
    from transformers import VitPoseBackbone, VitPoseBackboneConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4, "part_features": 4}
    config = VitPoseBackboneConfig(**sizes)
    with pytest.raises(InputError, match="no layer whose routing can be seen"):
        find(VitPoseBackbone(config))
    assert REFUSED.keys() == {"vitpose_backbone"}


def test_nllb_still_runs_two_experts_only() -> None:
    """Why its adapter warns: when transformers runs the experts that the router chose, adapter and warning must go."""
    model = tiny_moe("nllb-moe")
    ran: set[str] = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, name=name.rpartition(".")[2]: ran.add(name))
    model(**tiny_inputs(model))
    assert ran == {"expert_0", "expert_1"}


@pytest.mark.parametrize("wrong", ["ids", "weights", "output"])
def test_a_wrong_capture_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails on one wrong id, on weights off by a rounding, and on hooks that change the output."""
    model = tiny_moe("mixtral")
    checked, seen, received, _outputs = captured(model)
    point, each = checked.taps[0].point, seen[0]
    index_TK, weight_TK = each.index_TK.clone(), each.weight_TK.clone()
    if wrong == "ids":
        index_TK[5, 1] = (index_TK[5, 1] + 1) % point.num_experts
    elif wrong == "weights":
        weight_TK[5, 1] = torch.nextafter(weight_TK[5, 1], torch.tensor(2.0))
    else:
        hook = Capture._on_router

        def changing(self: Capture, number: int, tap: Tap) -> Any:
            watch = hook(self, number, tap)
            return lambda module, given, output: watch(module, given, output) or (output[0], 2 * output[1], output[2])

        monkeypatch.setattr(Capture, "_on_router", changing)
        with pytest.raises(InputError, match="gives another output while its routing is watched"):
            check(model, lambda: model(**tiny_inputs(model))[0])
        return
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            dense(index_TK, weight_TK, point.num_experts), received[point.name].float(), rtol=0, atol=0.0
        )
