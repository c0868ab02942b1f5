"""What every kernel promises, as checks that take a device: the interpreter's tests and a GPU's tests call the same.

The reference is moe_kernels.reference in float64. Memory that a kernel should write is filled with NaN before, and lies
between guard bands that are looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_kernels import SWIGLU, Activation, Dispatch, dispatch, expert_mlp, reference, route

GUARD = 256
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest ||found - reference|| / ||reference||. The interpreter cuts bfloat16 off where a GPU rounds it."""


@dataclass(frozen=True)
class Case:
    """One expert layer. `routing`: even, one (all rows to one expert), skewed, foreign (some ids of another rank)."""

    tokens: int = 13
    hidden: int = 24
    width: int = 20
    experts: int = 5
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    activation: Activation | Callable[[Tensor], Tensor] = SWIGLU
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    post_norm: bool = False
    routing: str = "even"
    seed: int = 0

    def inputs(self, device: str) -> Inputs:
        """Random tensors on a device."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) / 2
            return values.to(device, self.dtype).requires_grad_()

        gated = not isinstance(self.activation, Activation) or self.activation.gated
        rows = 2 * self.width if gated else self.width
        up, down = (self.experts, rows, self.hidden), (self.experts, self.hidden, self.width)
        if self.transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        tensors = {
            "x": normal(self.tokens, self.hidden),
            "gate_up": normal(*up),
            "down": normal(*down),
            "weight": normal(self.tokens, self.top_k),
        }
        if self.bias:
            tensors |= {"gate_up_bias": normal(self.experts, rows), "down_bias": normal(self.experts, self.hidden)}
        options: dict[str, Any] = {
            "activation": self.activation,
            "interleaved": self.interleaved,
            "transposed": self.transposed,
        }
        if self.post_norm:
            tensors["scale"] = normal(self.hidden)
        return Inputs(tensors, self.index(generator).to(device), options)

    def index(self, generator: torch.Generator) -> Tensor:
        """Chosen experts [T, K], different within a token where the routing allows it."""
        scores = torch.rand(self.tokens, self.experts, generator=generator)
        if self.routing == "skewed":
            scores += torch.arange(self.experts) / self.experts
        index = scores.topk(self.top_k).indices
        if self.routing == "one":
            index = torch.full_like(index, self.experts - 1)
        if self.routing == "foreign":
            index[::3, -1] = self.experts + 2
            index[1::4, 0] = -1
        return index


@dataclass(frozen=True)
class Inputs:
    """Tensors with gradients by name, the chosen experts, and the options that are no tensors."""

    tensors: dict[str, Tensor]
    index: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, layer: Callable[..., Tensor], names: tuple[str, str], dtype: torch.dtype | None = None) -> Any:
        """The layer's output and its gradients to all tensors, for a fixed random gradient to the output."""
        leaves = {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in self.tensors.items()
        }
        options = dict(self.options)
        if "gate_up_bias" in leaves:
            options |= dict(zip(names, (leaves["gate_up_bias"], leaves["down_bias"]), strict=True))
        if "scale" in leaves:
            options["post_norm"] = lambda rows: torch.nn.functional.rms_norm(rows, rows.shape[-1:], leaves["scale"])
        y = layer(leaves["x"], leaves["gate_up"], leaves["down"], self.index, leaves["weight"], **options)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, self.tensors["x"].dtype)
        return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype)), strict=True))


def check_experts(case: Case, device: str, gradients: bool = True) -> None:
    """The layer and its gradients equal the float64 reference's; nothing is written outside, nothing left unwritten."""
    inputs = case.inputs(device)
    truth, truths = inputs.run(reference.expert_mlp, ("gate_up_bias_EG", "down_bias_ED"), torch.float64)
    with guarded():
        if gradients:
            found, founds = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))
        else:
            with torch.no_grad(), mock.patch("torch.autograd.grad", lambda y, leaves, upstream: leaves):
                found, founds = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))[0], {}
    assert found.dtype == case.dtype
    assert error(found, truth) <= TOLERANCE[case.dtype]
    assert worst_row(found, truth) <= 5 * TOLERANCE[case.dtype]
    for name, gradient in founds.items():
        assert gradient.shape == inputs.tensors[name].shape, name
        assert gradient.dtype == case.dtype, name
        assert error(gradient, truths[name]) <= TOLERANCE[case.dtype], name


def check_frozen(case: Case, device: str) -> None:
    """With some tensors frozen the other gradients are the same bits, and the frozen ones cost nothing."""
    inputs = case.inputs(device)
    names = ("gate_up_bias", "down_bias")
    _, everything = inputs.run(expert_mlp, names)
    for frozen in (
        ("gate_up", "down", *names),
        ("x",),
        ("x", "gate_up", "down", *names),
        ("down", "weight"),
        ("gate_up",),
    ):
        leaves = {name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in inputs.tensors.items()}
        biases = {name: leaves[name] for name in names if name in leaves}
        y = expert_mlp(
            leaves["x"], leaves["gate_up"], leaves["down"], inputs.index, leaves["weight"], **biases, **inputs.options
        )
        learning = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
        for name, gradient in zip(learning, torch.autograd.grad(y, list(learning.values()), upstream), strict=True):
            assert torch.equal(gradient, everything[name]), (frozen, name)


def check_repeats(case: Case, device: str) -> None:
    """The same bits on every run, gradients too."""
    inputs = case.inputs(device)
    first, firsts = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))
    second, seconds = inputs.run(expert_mlp, ("gate_up_bias", "down_bias"))
    assert torch.equal(first, second)
    assert all(torch.equal(firsts[name], seconds[name]) for name in firsts)


def check_dispatch(index: Tensor, experts: int, block_m: int) -> None:
    """Equal to a stable sort; the schedule names every row block once, in order."""
    with guarded():
        found = dispatch(index, experts, block_m)
    offsets, row, inverse = reference.dispatch(index, experts)
    used = int(offsets[-1])
    assert found.offsets.tolist() == offsets.tolist()
    assert found.row[:used].tolist() == row[:used].tolist()
    assert found.inverse.tolist() == inverse.tolist()
    sizes = offsets.diff().tolist()
    blocks = [[e, b] for e in range(experts) for b in range(-(-sizes[e] // block_m))]
    assert found.n_blocks.tolist() == [len(blocks)]
    assert found.schedule[: len(blocks)].tolist() == blocks
    assert len(blocks) <= found.most_blocks <= len(found.schedule)
    assert isinstance(found, Dispatch)


def check_route(logits: Tensor, top_k: int, tolerance: float = 1e-6, **options: Any) -> None:
    """The choice, the weights and the gradient equal the float64 reference's."""
    bias = options.get("selection_bias_E")
    wide = {**options, **({} if bias is None else {"selection_bias_E": bias.double()})}
    theirs, ours = logits.detach().double().requires_grad_(), logits.detach().requires_grad_()
    truth_index, truth = reference.route(theirs, top_k, **wide)
    with guarded():
        index, weight = route(ours, top_k, **options)
        upstream = torch.linspace(-1, 2, weight.numel(), device=weight.device).view_as(weight)
        (gradient,) = torch.autograd.grad(weight, ours, upstream)
    assert torch.equal(index, truth_index)
    assert error(weight, truth) <= tolerance
    (expected,) = torch.autograd.grad(truth, theirs, upstream.double())
    assert gradient.dtype == logits.dtype
    assert (gradient - expected).norm() <= max(tolerance, 10 * torch.finfo(logits.dtype).eps) * (1e-3 + expected.norm())


def error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||; infinite if anything found is not a number, absolute where the truth is zero."""
    if not found.isfinite().all():
        return float("inf")
    norm = truth.detach().double().norm().item()
    return (found.detach().double() - truth.detach().double()).norm().item() / (norm or 1.0)


def worst_row(found: Tensor, truth: Tensor) -> float:
    """The largest error of a row, as a share of the mean norm of a row: one lost row among thousands is seen."""
    truth = truth.detach().double()
    rows = (found.detach().double() - truth).norm(dim=-1)
    return (rows.max() / truth.norm(dim=-1).mean()).item() if truth.norm() else rows.max().item()


@contextmanager
def guarded() -> Iterator[None]:
    """Tensors made empty inside start as NaN (integers: a large number) between guard bands that have to survive."""
    made: list[tuple[Tensor, Tensor]] = []

    def bands(dtype: torch.dtype) -> float:
        return float("nan") if dtype.is_floating_point else min(0x3F3F3F3F, torch.iinfo(dtype).max)

    def padded(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        count = int(torch.Size(shape).numel())
        whole = torch.full((count + 2 * GUARD,), bands(dtype), dtype=dtype, device=device)
        made.append((whole, whole.clone()))
        return whole[GUARD : GUARD + count].view(shape)

    def empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return padded(shape, dtype or torch.get_default_dtype(), device)

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def empty_like(like: Tensor, *, memory_format: Any = torch.preserve_format, **rest: Any) -> Tensor:
        if memory_format is torch.preserve_format and not like.is_contiguous() and like.mT.is_contiguous():
            return padded(tuple(like.mT.shape), like.dtype, like.device).mT
        return padded(tuple(like.shape), like.dtype, like.device)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield
    for whole, before in made:
        for band in (slice(0, GUARD), slice(-GUARD, None)):
            assert torch.equal(whole[band].view(torch.uint8), before[band].view(torch.uint8)), (
                "a guard band was overwritten"
            )
