"""Hooks that see what runs, or refuse: shapes at the edges, other ways to run experts, and silence that is no zero."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import moectl.integrations.transformers  # noqa: F401 - registers experts_implementation="moectl"
from moectl.errors import InputError
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.routing import adapters, tap
from moectl.routing.capture import Capture, Seen
from moectl.routing.check import check
from moectl.routing.points import find


def seen_in(model: Any, **inputs: Any) -> tuple[Seen, ...]:
    """What one forward pass shows."""
    with Capture(model) as capture, torch.no_grad():
        model(**inputs)
        return capture.take()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_choices_are_the_top_of_the_scores_at_any_shape(data: st.DataObject) -> None:
    """From one expert of one to all of many, from one token on: each row has the k experts with the highest scores."""
    experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, experts))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    model = tiny_moe("mixtral", num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=top_k)
    inputs = tiny_inputs(model, batch, tokens)
    checked = check(model, lambda: model(**inputs).logits)
    assert checked.notes == ()
    point = checked.taps[0].point
    assert (point.num_experts, point.top_k, point.selects) == (experts, top_k, True)
    (each,) = seen_in(model, **inputs)
    assert each.score_TE is not None
    assert each.index_TK.shape == each.weight_TK.shape == (batch * tokens, top_k)
    for row in range(batch * tokens):
        by_score = sorted(range(experts), key=lambda number: -float(each.score_TE[row, number]))
        assert each.index_TK[row].tolist() == by_score[:top_k]
        assert float(each.weight_TK[row].sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "moectl"])
def test_every_experts_implementation_is_seen_alike(implementation: str) -> None:
    """In the first layer, to which nothing has happened yet, to the bit."""
    model = tiny_moe("olmoe")
    inputs = tiny_inputs(model)
    model.set_experts_implementation("eager")
    expected = seen_in(model, **inputs)[0]
    model.set_experts_implementation(implementation)
    found = seen_in(model, **inputs)
    assert len(found) == 3
    assert torch.equal(found[0].index_TK, expected.index_TK)
    assert torch.equal(found[0].weight_TK, expected.weight_TK)


def test_padding_changes_nothing_for_the_tokens_before_it() -> None:
    """A causal model with rows padded on the right routes each token as it does alone."""
    model = tiny_moe("qwen3_moe")
    ids = tiny_inputs(model, 1, 9)["input_ids"]
    padded = torch.zeros(2, 12, dtype=torch.int64)
    padded[0, :9] = ids
    for alone, together in zip(seen_in(model, input_ids=ids), seen_in(model, input_ids=padded), strict=True):
        assert torch.equal(alone.index_TK, together.index_TK[:9])


def test_each_step_of_a_generation_is_taken_by_itself() -> None:
    """The prompt's rows first, then one row per sequence; they equal those of one pass over everything."""
    model = tiny_moe("mixtral")
    ids = tiny_inputs(model, 2, 8)["input_ids"]
    with Capture(model) as capture, torch.no_grad():
        output = model(input_ids=ids[:, :6], use_cache=True)
        passes = [capture.take()]
        for step in (6, 7):
            output = model(input_ids=ids[:, step : step + 1], past_key_values=output.past_key_values, use_cache=True)
            passes.append(capture.take())
    for number, whole in enumerate(seen_in(model, input_ids=ids)):
        parts = [each[number].index_TK.view(2, -1, 2) for each in passes]
        assert [part.shape[1] for part in parts] == [6, 1, 1]
        assert torch.equal(torch.cat(parts, 1), whole.index_TK.view(2, 8, 2))


def test_offloaded_layers_are_seen() -> None:
    """As accelerate does it: a hook around every layer's forward that brings its weights and takes them away."""
    model = tiny_moe("mixtral")
    inputs = tiny_inputs(model)
    expected = seen_in(model, **inputs)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu", offload=True))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    for found, each in zip(seen_in(model, **inputs), expected, strict=True):
        assert torch.equal(found.index_TK, each.index_TK)


def test_experts_inside_peft_wrappers_are_seen() -> None:
    """LoRA on the experts' parameters wraps their module twice; the router stands beside the outermost wrapper."""
    from peft import LoraConfig, get_peft_model

    model = tiny_moe("mixtral")
    inputs = tiny_inputs(model)
    expected = seen_in(model, **inputs)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    assert "base_layer.base_layer" in find(wrapped)[0].point.name
    for found, each in zip(seen_in(wrapped, **inputs), expected, strict=True):
        assert torch.equal(found.index_TK, each.index_TK)
        assert found.score_TE is not None and each.score_TE is not None
        assert torch.equal(found.score_TE, each.score_TE)


def test_expert_parallelism_is_seen_before_it_sends_tokens_away() -> None:
    """As transformers does it: the module knows its own experts, and another forward makes their numbers local."""
    model = tiny_moe("qwen3_moe")
    inputs = tiny_inputs(model)
    for layer in model.model.layers:
        layer.mlp.experts.num_experts = 4
        layer.mlp.experts.forward = lambda hidden_states, top_k_index, top_k_weights: hidden_states
    checked = check(model, lambda: model(**inputs).logits)
    assert [tap.point.num_experts for tap in checked.taps] == [8, 8, 8]
    assert all(int(each.index_TK.max()) == 7 for each in seen_in(model, **inputs))


def test_a_model_compiled_inside_is_seen_and_one_compiled_before_is_refused() -> None:
    model = tiny_moe("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    inputs = tiny_inputs(model)
    expected = seen_in(model, **inputs)
    with Capture(model) as capture, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            compiled(**inputs)
            assert torch.equal(capture.take()[0].index_TK, expected[0].index_TK)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(**inputs)
        with Capture(model) as capture:
            compiled(**inputs)
            with pytest.raises(InputError, match="was not seen to run") as error:
                capture.take()
    assert "compiled before the hooks" in error.value.why
    torch.compiler.reset()


def test_running_a_layer_twice_is_refused() -> None:
    model = tiny_moe("mixtral")
    with Capture(model) as capture, torch.no_grad():
        model(**tiny_inputs(model))
        model(**tiny_inputs(model))
        with pytest.raises(InputError, match=r"experts ran 2 times in one forward pass"):
            capture.take()
        model(**tiny_inputs(model))
        assert len(capture.take()) == 3, "and the next pass is taken as if nothing had happened"


def test_gradient_checkpointing_is_refused_before_it_counts_twice() -> None:
    model = tiny_moe("mixtral").train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    with pytest.raises(InputError, match="Gradient checkpointing is on"), Capture(model):
        pass
    with Capture(model.eval()) as capture:
        model(**tiny_inputs(model)).logits.sum().backward()
        assert len(capture.take()) == 3


def test_rows_that_are_missing_are_refused() -> None:
    """As where a layer sees only the tokens of one kind."""
    model = tiny_moe("mixtral")
    experts = model.model.layers[1].mlp.experts
    with Capture(model) as capture, torch.no_grad():
        model(**tiny_inputs(model))
        index, weight = capture._choices[1][0]
        capture._choices[1][0] = index[:-3], weight[:-3]
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts was given 29 rows"):
            capture.take()
    assert not experts._forward_pre_hooks


def test_nothing_is_left_behind() -> None:
    """Not after an error either."""
    model = tiny_moe("mixtral")
    with pytest.raises(RuntimeError, match="in between"), Capture(model):
        raise RuntimeError("in between")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_named(value: float) -> None:
    model = tiny_moe("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3, 0] = value
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts: the router's scores hold NaN or infinity"):
        check(model, lambda: model(**tiny_inputs(model)).logits)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(InputError, match="no layer whose routing can be seen"):
        find(nn.Sequential(nn.Linear(4, 4)))


class Router(nn.Module):
    """A plain linear router that chooses other than by its scores, and gives numbers that may be no experts."""

    def __init__(self, experts: int, shift: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 8))
        self.shift = shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights, numbers."""
        logits = F.linear(x, self.weight)
        top, index = logits.topk(2, dim=-1)
        return logits, top.softmax(-1), index + self.shift


class Experts(nn.Module):
    """Does nothing, in the ordinary way."""

    num_experts = 5

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x."""
        return hidden_states


class Block(nn.Module):
    """A layer of a family that nobody knows."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.router, self.experts = Router(5, shift), Experts()

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        _logits, weights, index = self.router(x)
        return self.experts(x, index, top_k_weights=weights)


def test_an_unknown_family_is_captured_by_its_signature() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"layers": nn.ModuleList([Block(0)])}), torch.randn(6, 8)
    model.forward = model["layers"][0].forward  # type: ignore[method-assign]
    (each,) = check(model, lambda: model(x)).taps
    assert (each.point.layer, each.point.num_experts, each.point.top_k, each.point.scoring) == (0, 5, 2, "softmax")
    assert each.point.selects and each.ordered


def test_numbers_that_are_no_experts_are_refused() -> None:
    torch.manual_seed(0)
    model, x = Block(3), torch.randn(6, 8)
    with pytest.raises(InputError, match=r"experts names expert [567], of 5"):
        check(model, lambda: model(x))


def test_choices_that_scores_do_not_explain_are_stated() -> None:
    """A plain router whose choice is not the top-k of its scores: said, and not assumed any further."""
    torch.manual_seed(0)
    model, x = Block(0), torch.randn(32, 8)
    model.router.register_forward_hook(lambda _m, _a, output: (output[0], output[1], (output[2] + 1) % 5))
    checked = check(model, lambda: model(x))
    assert not checked.taps[0].point.selects
    assert "are the top 2 of the router's scores" in checked.notes[0]


def test_scores_of_a_router_that_is_passed_by_are_missing_and_not_zero() -> None:
    """As where a block uses its router's weight and does not call it."""

    class Bypass(Block):
        def forward(self, x: Tensor) -> Tensor:
            _logits, weights, index = self.router.forward(x)
            return self.experts(x, index, weights)

    torch.manual_seed(0)
    model, x = Bypass(0), torch.randn(6, 8)
    checked = check(model, lambda: model(x))
    assert checked.taps[0].scores is None and checked.taps[0].point.score_kind == "none"
    assert checked.notes == ("experts: its router was not seen to give scores, so there are none.",)


def test_so_are_those_of_a_router_that_returns_none() -> None:
    """As Switch's in transformers 5.17, which returns the largest probability alone."""
    torch.manual_seed(0)
    model, x = Block(0), torch.randn(6, 8)
    logits = model(x)
    model.router.register_forward_hook(lambda _m, _a, output: (output[0][:, :1], output[1], output[2]))
    checked = check(model, lambda: model(x))
    assert checked.taps[0].scores is None and torch.equal(model(x), logits)


def test_mxfp4_blocks_are_read_from_the_logits_that_they_return() -> None:
    """Neither the router nor the experts of such a block are called, as with its GPU kernels."""

    class Mxfp4GptOssExperts(Experts):
        """Not called."""

    class Mxfp4GptOssMLP(nn.Module):
        """Its own routing, after transformers' class of the name."""

        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = Router(5, 0), Mxfp4GptOssExperts()
            self.router.top_k = 2  # type: ignore[assignment]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """x and the logits."""
            return x, F.linear(x.flatten(0, -2), self.router.weight)

    torch.manual_seed(0)
    block, x = Mxfp4GptOssMLP(), torch.randn(2, 3, 8)
    with Capture(block) as capture, torch.no_grad():
        _, logits = block(x)
        (each,) = capture.take()
    top, index = logits.topk(2, dim=-1)
    assert torch.equal(each.index_TK, index) and torch.equal(each.weight_TK, top.softmax(-1))


def test_other_packages_bring_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point called like the class of a module that is watched."""

    def own(model: nn.Module, name: str) -> tap.Tap:
        found = tap.dispatch_tap(model, name)
        return tap.Tap(found.point, found.experts, None, lambda index, weights: (index + 1, weights), None)

    entry = SimpleNamespace(name="Experts", load=lambda: own)
    asked: list[str] = []

    def entry_points(group: str) -> list[Any]:
        asked.append(group)
        return [entry]

    monkeypatch.setattr(adapters, "entry_points", entry_points)
    torch.manual_seed(0)
    block, x = Block(0), torch.randn(4, 8)
    with Capture(block) as capture, torch.no_grad():
        block(x)
        (each,) = capture.take()
    assert torch.equal(each.index_TK, block.router(x)[2] + 1)
    assert asked == ["moectl.routing_adapters"]
    assert EntryPoint("Experts", "package.module:own", asked[0]).group == adapters.ENTRY_POINTS
