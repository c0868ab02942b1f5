"""The CPU path is the reference in float64, gradients included, and in half precision no worse than transformers'."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import properties
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import check_frozen
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_kernels import GEGLU, GPT_OSS, RELU2, SWIGLU, Activation, cpu, expert_mlp, reference
from moe_kernels.cpu import layer, products

ACTIVATIONS = (SWIGLU, GEGLU, GPT_OSS, RELU2, Activation("relu"), Activation("gelu_tanh"), Activation("silu", False))
NAMES = ("x", "gate_up", "down", "weight", "gate_up_bias", "down_bias")
EXACT = 1e-11


@dataclass(frozen=True)
class Case:
    """One layer and one batch; `upstream` is the gradient to y."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    index: Tensor
    weight: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    upstream: Tensor
    activation: Activation = SWIGLU
    interleaved: bool = False

    def leaves(self, dtype: torch.dtype | None = None) -> Case:
        """The same values as leaves that want a gradient."""
        tensors = {name: getattr(self, name) for name in NAMES}
        return replace(
            self,
            **{n: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()},
            upstream=self.upstream.to(dtype or self.upstream.dtype),
        )


def make(
    tokens: int, hidden: int, width: int, experts: int, top_k: int, *, seed: int = 0, skew: str = "uniform",
    biases: bool = False, activation: Activation = SWIGLU, interleaved: bool = False, transposed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:  # fmt: skip
    """A case whose last expert gets no row; `skew`: "one" sends all tokens to expert 0, "dropped" has others' ids."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = 2 * width if activation.gated else width
    index = torch.rand(tokens, max(experts - 1, top_k), generator=generator).argsort(-1)[:, :top_k]
    if skew == "one":
        index[:, 0] = 0
    if skew == "dropped":
        others = torch.tensor([-1, experts, experts + 7])
        other = torch.rand(tokens, top_k, generator=generator) < 0.4
        index = torch.where(other, others[torch.randint(3, (tokens, top_k), generator=generator)], index)
    gate_up, down = normal(experts, rows, hidden, scale=hidden**-0.5), normal(experts, hidden, width, scale=width**-0.5)
    if transposed:
        gate_up, down = (w.mT.contiguous().mT for w in (gate_up, down))
    case = Case(
        normal(tokens, hidden), gate_up, down, index, torch.rand(tokens, top_k, generator=generator).double(),
        normal(experts, rows) if biases else None, normal(experts, hidden) if biases else None,
        normal(tokens, hidden), activation, interleaved,
    )  # fmt: skip
    return replace(
        case, **{n: t.to(dtype) for n, t in vars(case).items() if isinstance(t, Tensor) and t.dtype.is_floating_point}
    )


@st.composite
def cases(draw: Any) -> Case:
    experts = draw(st.integers(1, 9))
    return make(
        draw(st.sampled_from((0, 1, 2, 3, 17, 70))), draw(st.sampled_from((1, 4, 7, 16))),
        draw(st.sampled_from((1, 3, 8))), experts, draw(st.integers(1, min(3, experts))),
        seed=draw(st.integers(0, 1000)), skew=draw(st.sampled_from(("uniform", "one", "dropped"))),
        biases=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)), interleaved=draw(st.booleans()), transposed=draw(st.booleans()),
    )  # fmt: skip


def by_reference(case: Case) -> Tensor:
    return reference.expert_mlp(
        case.x, case.gate_up, case.down, case.index, case.weight, activation=case.activation,
        gate_up_bias_EG=case.gate_up_bias, down_bias_ED=case.down_bias, interleaved=case.interleaved,
    )  # fmt: skip


def ours(case: Case) -> Tensor:
    return expert_mlp(
        case.x, case.gate_up, case.down, case.index, case.weight, activation=case.activation,
        gate_up_bias=case.gate_up_bias, down_bias=case.down_bias, interleaved=case.interleaved,
    )  # fmt: skip


def gradients(case: Case, layer: Callable[[Case], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    case = case.leaves()
    y = layer(case)
    y.backward(case.upstream)
    return y.detach(), {n: getattr(case, n).grad for n in NAMES if getattr(case, n) is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference against the largest value."""
    if found.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(case=cases(), rows=st.sampled_from((1, 8, 1024)), streamed=st.sampled_from((0, 48)))
def test_forward_and_every_gradient_are_those_of_the_reference(case: Case, rows: int, streamed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "ROWS", rows)
        patch.setattr(products, "STREAMED_ROWS", streamed)
        expected, expected_gradients = gradients(case, by_reference)
        found, found_gradients = gradients(case, ours)
        with torch.no_grad():
            without_saving = ours(case)
    assert distance(found, expected) < EXACT
    assert distance(without_saving, expected) < EXACT
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        reference_gradient = expected_gradients[name]
        assert gradient.shape == reference_gradient.shape
        assert torch.allclose(gradient, reference_gradient, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("tokens", (1, 2, 5, 40, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_every_way_to_multiply_is_the_same_product(tokens: int, dtype: torch.dtype) -> None:
    """One row, a few, some and many of them per expert, for small matrices, large, odd and transposed ones."""
    for hidden, width in ((32, 16), (33, 15), (1100, 250)):
        for transposed in (False, True):
            case = make(tokens, hidden, width, 3, 2, transposed=transposed, biases=True, dtype=dtype)
            tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
            expected = by_reference(case.leaves(torch.float64))
            assert distance(ours(case), expected) < tolerance
            wrong = case.gate_up.clone()
            wrong[0] *= 1 + 100 * tolerance
            assert distance(ours(replace(case, gate_up=wrong)), expected) > tolerance or not (case.index == 0).any()


def test_a_weight_that_is_one_percent_off_is_seen() -> None:
    case = make(17, 16, 8, 4, 2)
    weight = case.weight.clone()
    weight[3] *= 1.01
    assert distance(ours(replace(case, weight=weight)), by_reference(case)) > 1e6 * EXACT


def test_gradcheck() -> None:
    for skew, activation in (("uniform", SWIGLU), ("dropped", GPT_OSS), ("one", Activation("gelu", gated=False))):
        case = make(3, 4, 3, 4, 2, skew=skew, activation=activation, biases=True).leaves()

        def layer(*leaves: Tensor, case: Case = case) -> Tensor:
            return ours(replace(case, **dict(zip(NAMES, leaves, strict=True))))

        assert torch.autograd.gradcheck(layer, [getattr(case, name) for name in NAMES])


def test_ids_of_other_ranks_change_nothing_even_where_numbers_are_not_finite() -> None:
    case = make(9, 16, 8, 4, 2)
    index = case.index.clone()
    index[2], index[5, 1] = 4, -3
    x = case.x.clone()
    x[2] = float("nan")  # both of its choices are another rank's
    case = replace(case, index=index, x=x)
    y, found = gradients(case, ours)
    assert y[2].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["weight"][2].eq(0).all() and found["weight"][5, 1] == 0 and found["x"][2].eq(0).all()
    assert found["gate_up"][3].eq(0).all() and found["down"][3].eq(0).all()


def test_the_same_input_gives_the_same_bits() -> None:
    case = make(300, 32, 16, 5, 2, dtype=torch.bfloat16, biases=True)
    (y, first), (again, second) = (gradients(case, ours) for _ in range(2))
    assert torch.equal(y, again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def transformers_layer(case: Case) -> Callable[[Case], Tensor]:
    config = Qwen3MoeConfig(
        hidden_size=case.x.shape[1], moe_intermediate_size=case.down.shape[2], num_experts=len(case.down),
    )  # fmt: skip
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)

    def run(case: Case) -> Tensor:
        del experts.gate_up_proj, experts.down_proj
        experts.gate_up_proj, experts.down_proj = case.gate_up, case.down
        return experts(case.x, case.index, case.weight)

    return run


@pytest.mark.parametrize("tokens", (1, 2, 64, 200))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("router", ("same", "float32"))
def test_half_precision_is_no_worse_than_transformers(tokens: int, dtype: torch.dtype, router: str) -> None:
    """Squared error of y and of every gradient against float64, over several draws so that luck is under 2 %."""
    ours_squared, theirs_squared = defaultdict(float), defaultdict(float)
    for seed in range(max(1, 120 // tokens)):
        case = make(tokens, 64, 32, 8, 3, dtype=dtype, seed=seed)
        if router == "float32":
            case = replace(case, weight=make(tokens, 64, 32, 8, 3, seed=seed).weight.float())
        exact, found, theirs = (
            {"y": y, **of}
            for y, of in (
                gradients(case.leaves(torch.float64), by_reference),
                gradients(case, ours),
                gradients(case, transformers_layer(case)),
            )
        )
        for name, expected in exact.items():
            ours_squared[name] += float((found[name].double() - expected).square().sum())
            theirs_squared[name] += float((theirs[name].double() - expected).square().sum())
    for name, error in ours_squared.items():
        assert error <= 1.02 * theirs_squared[name], name


@pytest.mark.parametrize("skew", ("uniform", "one", "dropped"))
def test_grouped_products_are_a_loop_over_experts(skew: str) -> None:
    for strided in (False, True):
        case = make(40, 16, 8, 5, 2, skew=skew, transposed=strided)
        offsets, row, _ = reference.dispatch(case.index, 5)
        x, dy = case.x[row // 2], torch.randn(len(row), 16, dtype=torch.float64)
        x[offsets[-1] :] = dy[offsets[-1] :] = float("nan")
        y = cpu.grouped_mm(x, case.gate_up, offsets.int(), len(row))
        dw = cpu.grouped_outer(dy, x, offsets.int(), case.gate_up)
        assert dw.stride() == case.gate_up.stride()
        assert y[offsets[-1] :].eq(0).all()
        for e in range(5):
            place = slice(int(offsets[e]), int(offsets[e + 1]))
            assert torch.allclose(y[place], x[place] @ case.gate_up[e].T, rtol=1e-12, atol=1e-12)
            assert torch.allclose(dw[e], dy[place].T @ x[place], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packed_weights_compute_the_same(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]
    for tokens in (0, 1, 2, 40):
        for activation in (SWIGLU, GPT_OSS, RELU2):
            for interleaved, transposed, biases in ((False, False, False), (True, True, True)):
                case = make(
                    tokens, 32, 16, 5, 2, skew="dropped", activation=activation, interleaved=interleaved,
                    transposed=transposed, biases=biases, dtype=dtype,
                )  # fmt: skip
                stored = [w.mT if transposed else w for w in (case.gate_up, case.down)]
                packed = cpu.pack(
                    *stored, activation=activation, interleaved=interleaved, transposed=transposed,
                    gate_up_bias=case.gate_up_bias, down_bias=case.down_bias,
                )  # fmt: skip
                expected = by_reference(case.leaves(torch.float64))
                assert distance(packed.forward(case.x, case.index, case.weight), expected) < tolerance
                assert packed.nbytes >= case.gate_up.nbytes + case.down.nbytes


def test_packing_refuses_what_onednn_has_no_product_for() -> None:
    case = make(1, 16, 8, 2, 1)
    with pytest.raises(ValueError, match="float64"):
        cpu.pack(case.gate_up, case.down)
    with pytest.raises(ValueError, match="meta"):
        cpu.pack(case.gate_up.to("meta"), case.down.to("meta"))


def test_autocast_computes_in_its_type_as_torch_does() -> None:
    """float32 matrices under autocast: the same rounding as torch's own linear layers have, gradients in float32."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, weight = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((9, 16), (4, 24, 16), (4, 16, 12), (9, 2))
    )
    index = torch.rand(9, 4, generator=generator).topk(2).indices
    plain = expert_mlp(x, gate_up, down, index, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_mlp(x, gate_up, down, index, weight)
    assert found.dtype == torch.float32
    half = [tensor.detach().bfloat16() for tensor in (x, gate_up, down)]
    assert torch.equal(found, expert_mlp(*half, index, weight).float())
    assert 1e-4 < ((found - plain).norm() / plain.norm()).item() < 2e-2
    for gradient in torch.autograd.grad(found.sum(), (x, gate_up, down, weight)):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("routing", ["even", "foreign"])
def test_frozen_tensors_cost_nothing_and_change_nothing(routing: str) -> None:
    check_frozen(properties.Case(routing=routing, bias=True, tokens=40), "cpu")
