"""Ternary experts on a GPU: the interpreter's properties at real sizes, and what only a device shows: races, graphs."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from properties import error
from ternary_properties import Layer, Matrices, check_decode, check_layer, check_matvec

from moe_kernels import GPT_OSS, RELU2, reference, ternary
from moe_kernels.gpu import ternary as kernels
from moectl.codecs.tables import QMOE, RATIOS

MIXTRAL = Matrices(2, 512, 14336, 0.93, dtype=torch.bfloat16)
SHAPES = {
    "mixtral": MIXTRAL,
    "qwen3": Matrices(16, 2048, 768, dtype=torch.bfloat16),
    "float32": Matrices(4, 700, 1000, dtype=torch.float32),
    "half": Matrices(4, 333, 777, dtype=torch.float16),
    "one by one": Matrices(1, 1, 1, 0.5),
    "no weights": Matrices(2, 3, 0),
    "all zeros": Matrices(3, 100, 5000, 1.0),
    "a codeword beyond the end": Matrices(3, 200, 300, 0.99),
    **{f"table {number}": Matrices(3, 300, 2000, 0.7, number) for number in (QMOE, *RATIOS)},
}
LARGE = Layer(tokens=4, top_k=4, hidden=512, width=384, experts=16, dtype=torch.bfloat16)
LAYERS = {
    "bfloat16": LARGE,
    "float32": replace(LARGE, dtype=torch.float32),
    "half": replace(LARGE, dtype=torch.float16),
    "gpt-oss": replace(LARGE, activation=GPT_OSS, interleaved=True, bias=True),
    "another rank's experts": replace(LARGE, bias=True, foreign=True),
    "relu squared, odd widths": replace(LARGE, activation=RELU2, hidden=259, width=131),
    "somebody's own": replace(LARGE, activation=lambda h: h[..., :384].tanh() * h[..., 384:], post_norm=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str) -> None:
    check_decode(SHAPES[name], "cuda")


@pytest.mark.parametrize("tokens", [1, 4, 33])
@pytest.mark.parametrize("name", SHAPES)
def test_matvec(name: str, tokens: int) -> None:
    ids = [(7 * place) % (SHAPES[name].experts + 1) for place in range(tokens)]
    check_matvec(SHAPES[name], "cuda", ids)
    check_matvec(SHAPES[name], "cuda", [0] * tokens, strided=True)


@pytest.mark.parametrize("tokens", [1, 2, 12, 300])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, tokens: int) -> None:
    """One token and a few by codewords, many by decoded matrices."""
    check_layer(replace(LAYERS[name], tokens=tokens), "cuda")


def test_both_ways_are_taken() -> None:
    for tokens, fused in ((2, 1), (300, 0)):
        with mock.patch.object(kernels, "forward", wraps=kernels.forward) as ran:
            check_layer(replace(LARGE, tokens=tokens), "cuda")
        assert ran.call_count == fused


def test_gradients() -> None:
    check_layer(replace(LARGE, bias=True, tokens=30), "cuda", gradients=True)


def test_the_same_bits_every_time() -> None:
    """A race between the zeros and the weights of a decoded row, or in a sum, would show as bits that change."""
    coded, weights = MIXTRAL.coded("cuda")
    x = torch.randn(9, MIXTRAL.width, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 0], device="cuda")
    first = ternary.matvec(coded, x, ids)
    for _ in range(20):
        assert torch.equal(ternary.matvec(coded, x, ids), first)
        assert torch.equal(ternary.decode(coded), weights)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_a_cuda_graph_replays_with_new_inputs(tokens: int) -> None:
    """Nothing waits for the host: captured once, replayed with other tokens and other experts."""
    up, up_weights = Matrices(16, 768, 512, dtype=torch.bfloat16).coded("cuda")
    down, down_weights = Matrices(16, 512, 384, dtype=torch.bfloat16, seed=1).coded("cuda")
    x, weight = torch.randn(tokens, 512, device="cuda").bfloat16(), torch.rand(tokens, 4, device="cuda")
    index = torch.rand(tokens, 16, device="cuda").topk(4).indices
    with torch.no_grad():
        ternary.ternary_mlp(x, up, down, index, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ternary.ternary_mlp(x, up, down, index, weight)
        x.copy_(torch.randn_like(x))
        index.copy_(torch.rand(tokens, 16, device="cuda").topk(4).indices)
        graph.replay()
        torch.cuda.synchronize()
        wide = [tensor.double() for tensor in (x, up_weights, down_weights)]
        truth = reference.expert_mlp(*wide, index, weight.double())
    assert error(y, truth) <= 2e-2
