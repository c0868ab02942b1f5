"""Who goes where in a benchmark: routings from uniform to one hot expert, or out of a recorded trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moectl.bench.shapes import Shape
from moectl.errors import InputError, UsageError
from moectl.text import shown

Draw = Callable[[int, torch.Generator], Tensor]
"""From a number of tokens T and a generator to chosen experts [T, K], int64, all different within one token."""

KINDS = "uniform, balanced, zipf:EXPONENT, hot:SHARE or trace:FILE"


def make(text: str, shape: Shape) -> Draw:
    """The routing that `--routing` asks for.

    Raises:
        UsageError: no such routing, or its number is out of range.
        InputError: a trace that cannot be read or is of another shape.
    """
    kind, _, value = text.partition(":")
    experts, top_k = shape.num_experts, shape.top_k
    if kind == "trace" and value:
        return _traced(Path(value), shape)
    if kind == "uniform" and not value:
        return lambda tokens, generator: torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    if kind == "balanced" and not value:
        return lambda tokens, generator: _balanced(tokens, shape, generator)
    if kind == "zipf" and 0 <= (exponent := _number(value)) < math.inf:
        return lambda tokens, generator: _zipf(tokens, shape, exponent, generator)
    if kind == "hot" and 0 <= (share := _number(value)) <= 1 and (experts > top_k or share == 1):
        return lambda tokens, generator: _hot(tokens, shape, share, generator)
    raise UsageError(f"--routing {shown(text)} is not a routing of this shape.", "", f"It is one of {KINDS}.")


def weights(index_TK: Tensor, generator: torch.Generator) -> Tensor:
    """Routing weights [T, K] that add up to 1 per token, float32."""
    return torch.randn(index_TK.shape, generator=generator).softmax(-1)


def counts(index_TK: Tensor, experts: int) -> list[int]:
    """Routed rows of every expert; ids outside 0..E-1 are another device's and are left out."""
    flat = index_TK.reshape(-1)
    return torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts).tolist()


def _balanced(tokens: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Every expert the same number of rows, give or take one: the K*T places are dealt round, then tokens shuffled."""
    place = torch.arange(tokens * shape.top_k).view(tokens, shape.top_k) % shape.num_experts
    names = torch.randperm(shape.num_experts, generator=generator)
    return names[place][torch.randperm(tokens, generator=generator)]


def _zipf(tokens: int, shape: Shape, exponent: float, generator: torch.Generator) -> Tensor:
    """Experts drawn without replacement with odds rank^-exponent (Gumbel top-k, arXiv 1903.06059)."""
    odds = -exponent * torch.arange(1, shape.num_experts + 1).log()
    uniform = torch.rand(tokens, shape.num_experts, generator=generator).clamp_min(1e-20)
    gumbel = -(-uniform.log()).clamp_min(1e-20).log()
    names = torch.randperm(shape.num_experts, generator=generator)
    return names[(odds + gumbel).topk(shape.top_k).indices]


def _hot(tokens: int, shape: Shape, share: float, generator: torch.Generator) -> Tensor:
    """One expert is chosen by a `share` of the tokens, exactly; everything else is uniform over the others."""
    scores = torch.rand(tokens, shape.num_experts, generator=generator)
    hot = int(torch.randint(shape.num_experts, (), generator=generator))
    chosen = torch.randperm(tokens, generator=generator) < round(share * tokens)
    scores[:, hot] = torch.where(chosen, 2.0, -1.0)
    return scores.topk(shape.top_k).indices


def _traced(path: Path, shape: Shape) -> Draw:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        index = load_file(path)["index"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{shown(str(path))} is not a routing trace: {shown(str(error))}.",
            "A trace is a safetensors file with a tensor `index` [tokens, k] or [layers, tokens, k].",
            "Check the path.",
        ) from error
    layers = index.long().reshape(-1, *index.shape[-2:]) if index.ndim in (2, 3) else index
    if index.ndim not in (2, 3) or layers.shape[-1] != shape.top_k or not layers.numel():
        raise InputError(
            f"`index` in {shown(str(path))} is {list(index.shape)}.",
            f"This shape needs [tokens, {shape.top_k}] or [layers, tokens, {shape.top_k}].",
            "Give the shape of the model that was traced.",
        )
    if layers.min() < 0 or layers.max() >= shape.num_experts:
        raise InputError(
            f"{shown(str(path))} names expert {int(layers.max())} (or a negative one).",
            f"This shape has experts 0 to {shape.num_experts - 1}.",
            "Give the shape of the model that was traced.",
        )

    def draw(tokens: int, generator: torch.Generator) -> Tensor:
        """A run of tokens of one layer, both at random, from the start again where the trace is too short."""
        layer = layers[int(torch.randint(len(layers), (), generator=generator))]
        start = int(torch.randint(len(layer), (), generator=generator))
        return layer[(start + torch.arange(tokens)) % len(layer)]

    return draw


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
