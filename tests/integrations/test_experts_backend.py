"""Every family of the installed transformers that takes an experts implementation computes the same with ours.

The families are found in the installed source, so one that a new release adds or changes is walked without being asked,
and passes, or fails under its name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

from moe_kernels import GEGLU, SWIGLU, Activation
from moe_kernels.activations import KINDS
from moectl.errors import InputError
from moectl.families.backend import GATES, experts_classes
from moectl.families.tiny_moe import model_types, tiny_inputs, tiny_moe
from moectl.integrations import layout
from moectl.integrations import transformers as backend

CLASSES = experts_classes()
COVERED = [family for family, classes in CLASSES.items() if classes]

TOLERANCE = 1e-5

ILL_CONDITIONED = {
    *("bailing_hybrid", "beam", "deepseek_v4", "diffusion_gemma", "gemma4", "glm5_next", "granitemoe_swa", "hy_v4"),
    *("inkling", "kimi_linear", "muse_spark", "qwen3_5_moe", "qwen3_next", "qwen4_exp", "zaya"),
}
"""Families in which some gradient, mostly of one scale (of hyper-connections, heads, a router) or of the decay of
linear attention, is a small sum of large terms: float32 alone left 4e-6 to 3e-4 in it in at least one of six seeds.
There every gradient is compared in float64, and in float32 all of them together."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The chosen experts of every call that reaches our kernels."""
    seen: list[Tensor] = []
    run = backend.expert_mlp

    def counted(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(index)
        return run(x, gate_up, down, index, *rest, **options)

    monkeypatch.setattr(backend, "expert_mlp", counted)
    return seen


def outcome(model: Any, implementation: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of one forward pass, and the gradients that a random direction of it sends to every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad(set_to_none=True)
    output = model(**tiny_inputs(model, seed=seed))[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
    (output * direction).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; where nothing is expected, |found|."""
    return float(((found - expected).norm() / (expected.norm() or 1.0)).detach())


def together(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def check(model: Any, implementation: str = "moectl", each: bool = True) -> None:
    """Compare an implementation with eager: the output, all gradients as one vector, and with `each` one by one."""
    expected, expected_gradients = outcome(model, "eager")
    found, found_gradients = outcome(model, implementation)
    assert distance(found, expected) <= TOLERANCE
    assert found_gradients.keys() == expected_gradients.keys()
    assert distance(together(found_gradients), together(expected_gradients)) <= TOLERANCE
    if each:
        errors = {name: distance(g, expected_gradients[name]) for name, g in found_gradients.items()}
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("family", COVERED)
def test_family_equals_eager(family: str, calls: list[Tensor], record_property: Callable[[str, Any], None]) -> None:
    """Output and all gradients, with every call of an experts layer ours and several experts at work in each."""
    reached = set()
    for model_type in model_types(family):
        model = tiny_moe(model_type)
        names = {item.name for item in CLASSES[family]}
        layers = [module for module in model.modules() if type(module).__name__ in names]
        reached |= {type(module).__name__ for module in layers}
        ran: list[Any] = []
        for layer in layers:
            layer.register_forward_hook(lambda module, *_, ran=ran: ran.append(module))
        calls.clear()
        check(model, each=family not in ILL_CONDITIONED)
        assert 0 < len(calls) == len(ran) / 2, "once with eager, once with ours"
        assert all(index.unique().numel() >= 3 for index in calls)
        if family in ILL_CONDITIONED:
            check(model.double())
        check_activation(layers[0], next(item for item in CLASSES[family] if item.name == type(layers[0]).__name__))
    assert reached == {item.name for item in CLASSES[family]}
    record_property("experts families", 1)


def check_activation(experts: Any, listed: Any) -> None:
    """The fused activation is the module's own method on rows far beyond any clamp, and is fused where we say so."""
    activation = layout.activation_of(experts)
    assert (activation is None or layout.has_post_norm(experts)) == bool(listed.unfused)
    if activation is None:
        return
    rows_SG = 12 * torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    own = experts._apply_gate if experts.has_gate else experts.act_fn
    assert distance(activation(rows_SG, interleaved=not experts.is_concatenated), own(rows_SG)) <= 1e-6
    if activation.limit is not None:
        assert distance(Activation(activation.kind)(rows_SG), own(rows_SG)) > 0.1, "the rows do not reach the clamps"


def test_every_gate_in_the_table_is_a_class_of_transformers() -> None:
    own = {item.name for classes in CLASSES.values() for item in classes if item.own_gate}
    newer = set() if installed("beam") else {"BeamExperts"}
    assert GATES.keys() <= own | newer


@pytest.mark.parametrize("wrong", [GEGLU, Activation(limit=0.1), Activation(offset=1e-3)])
def test_a_wrong_activation_is_found(wrong: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "activation_of", lambda module: wrong)
    with pytest.raises(AssertionError):
        check(tiny_moe("mixtral"))


def test_activations_are_recognised_by_what_they_compute() -> None:
    """Each of transformers' activations that we fuse is that function, and none that we pass by is one of ours."""
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    for name in ACT2FN:
        function = ACT2FN[name]
        if type(function) in layout.KNOWN:
            kind, alpha = layout.KNOWN[type(function)]
            assert distance(Activation(kind, alpha=alpha).function(z), function(z)) <= 1e-9, name
            assert not list(function.parameters()), name
        else:
            apart = [distance(Activation(kind).function(z), function.double()(z)) for kind in KINDS]
            assert min(apart) > 1e-3, name


def experts_of(model: Any, name: str = "Experts") -> Any:
    """The first experts module of a model."""
    return next(module for module in model.modules() if type(module).__name__.endswith(name))


def test_what_is_not_surely_known_goes_through_the_modules_own_method(calls: list[Tensor]) -> None:
    """A method or an activation that someone replaced is called, and its parameters get their gradients."""
    model = tiny_moe("mixtral")
    experts = experts_of(model)
    assert layout.activation_of(experts) == SWIGLU
    experts.act_fn = nn.PReLU()
    assert layout.activation_of(experts) is None
    check(model)
    assert experts.act_fn.weight.grad is not None

    experts.act_fn = nn.SiLU()
    plain = experts._apply_gate
    experts._apply_gate = lambda gate_up: 2 * plain(gate_up)
    assert layout.activation_of(experts) is None
    hidden, index, weight = batch(experts)
    found = backend.experts_forward(experts, hidden, index, weight)
    del experts._apply_gate
    assert distance(found, 2 * backend.experts_forward(experts, hidden, index, weight)) <= 1e-6


def test_a_class_from_elsewhere_is_not_taken_for_the_one_it_is_called_after() -> None:
    own = experts_of(tiny_moe("gpt_oss"))

    class GptOssExperts(type(own)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate_up[..., ::2]

    assert layout.activation_of(own) is not None
    own.__class__ = GptOssExperts
    assert layout.activation_of(own) is None


def test_wrapped_weights_are_read_at_every_call() -> None:
    """As PEFT does it: a parametrisation changes the class of the module and makes a new weight each time."""

    class LowRank(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(0.1 * torch.randn(len(weight), n, 2)) for n in weight.shape[1:])

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.a @ self.b.mT

    model = tiny_moe("gpt_oss")
    experts = experts_of(model)
    before, _ = outcome(model, "moectl")
    parametrize.register_parametrization(experts, "gate_up_proj", LowRank(experts.gate_up_proj))
    assert layout.activation_of(experts) is not None
    check(model)
    assert distance(outcome(model, "moectl")[0], before) > 1e-3


def batch(experts: Any, tokens: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, two experts each, and their weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, experts.config.hidden_size, generator=generator)
    weight, index = torch.rand(tokens, experts.num_experts, generator=generator).topk(2, dim=-1)
    return hidden.requires_grad_(), index, weight.requires_grad_()


@pytest.mark.parametrize("model_type", installed("mixtral", "gpt_oss", "inkling2_text", "muse_spark_text"))
def test_experts_of_other_ranks_add_nothing(model_type: str) -> None:
    """Two ranks with half of the experts each add up to all; the weight of another rank's expert gets no gradient."""
    whole = experts_of(tiny_moe(model_type))
    width = whole.gate_up_proj.shape[1 if whole.is_transposed else 2]
    hidden, index, weight = batch(whole)
    hidden = torch.randn(len(hidden), width).requires_grad_()
    expected = backend.experts_forward(whole, hidden, index, weight)
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), (hidden, weight))

    half = whole.num_experts // 2
    weights = {name: tensor.detach().clone() for name, tensor in whole.named_parameters(recurse=False)}
    parts: list[tuple[Tensor, ...]] = []
    for first in (0, half):
        whole.num_experts, whole._is_expert_parallel = half, True
        for name, tensor in weights.items():
            setattr(whole, name, nn.Parameter(tensor[first : first + half]))
        here = (index >= first) & (index < first + half)
        local = torch.where(here, index - first, half)
        output = backend.experts_forward(whole, hidden, local, weight)
        gradients = torch.autograd.grad((output * direction).sum(), (hidden, weight))
        assert (gradients[1][~here] == 0).all()
        parts.append((output, *gradients))
    for found, wanted in zip(map(sum, zip(*parts, strict=True)), (expected, *expected_gradients), strict=True):
        assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("model_type", installed("mixtral", "inkling2_text"))
def test_no_tokens(model_type: str) -> None:
    experts = experts_of(tiny_moe(model_type))
    output = backend.experts_forward(experts, *batch(experts, tokens=0))
    output.sum().backward()
    assert output.shape == (0, experts.config.hidden_size)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize(("tokens", "weights"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_types_that_autocast_mixes(tokens: str, weights: str) -> None:
    """The result has the type of the tokens and the accuracy of the coarser of the two."""
    experts = experts_of(tiny_moe("mixtral"))
    hidden, index, weight = batch(experts)
    expected = backend.experts_forward(experts, hidden, index, weight)
    experts.to(getattr(torch, weights))
    found = backend.experts_forward(experts, hidden.to(getattr(torch, tokens)), index, weight)
    assert found.dtype == getattr(torch, tokens)
    assert distance(found.float(), expected) <= 0.02


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_generated_tokens_are_those_of_eager(model_type: str, calls: list[Tensor]) -> None:
    model = tiny_moe(model_type)
    tokens = {}
    for implementation in ("eager", "moectl"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(**tiny_inputs(model, tokens=4), max_new_tokens=12, do_sample=False)
    assert tokens["moectl"].shape[1] > 5
    assert torch.equal(tokens["moectl"], tokens["eager"])
    assert {len(index) for index in calls} >= {2, 8}, "prompt and single tokens, both through our function"


@pytest.fixture
def compiler() -> Iterator[None]:
    """A compiler without what earlier tests left in it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v4"])
def test_compiles_as_one_graph(model_type: str, compiler: None) -> None:
    """The experts' part of a model, forward and backward, in one graph."""
    experts = experts_of(tiny_moe(model_type))
    experts.config._experts_implementation = "moectl"
    hidden, index, weight = batch(experts)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    results = []
    for run in (experts, compiled):
        experts.zero_grad()
        output = run(hidden, index, weight)
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, weight, *experts.parameters()])])
    assert all(distance(found, expected) <= 1e-6 for expected, found in zip(*results, strict=True))


def test_a_compiled_model_equals_eager(compiler: None) -> None:
    model = tiny_moe("mixtral")
    expected, expected_gradients = outcome(model, "eager")
    model.set_experts_implementation("moectl")
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**tiny_inputs(model), use_cache=False)[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * direction).sum().backward()
    assert distance(output, expected) <= TOLERANCE
    assert all(distance(p.grad, expected_gradients[name]) <= TOLERANCE for name, p in model.named_parameters())


def test_from_pretrained(tmp_path: Path, calls: list[Tensor]) -> None:
    """Given at loading; without it transformers' default stays, and an unknown name is refused by transformers."""
    tiny_moe("olmoe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moectl")
    assert model.get_experts_implementation()[""] == "moectl"
    output = model(**tiny_inputs(model))[0]
    assert len(calls) == model.config.num_hidden_layers
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(output, model(**tiny_inputs(model))[0]) <= TOLERANCE
    assert len(calls) == model.config.num_hidden_layers
    with pytest.raises(ValueError, match="moectl"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moeclt")


def test_8_bit_experts_are_refused_with_a_way_out() -> None:
    model = tiny_moe("mixtral")
    model.set_experts_implementation("moectl")
    replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
    experts = experts_of(model, "FP8Experts")
    assert isinstance(experts, FP8Experts)
    with pytest.raises(InputError, match="FP8") as refused:
        experts(torch.zeros(2, 64), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
    assert "grouped_mm" in refused.value.fix and "dequantize=True" in refused.value.fix


def test_importing_moectl_registers_nothing() -> None:
    program = "import moectl, moectl.integrations, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
