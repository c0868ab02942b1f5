"""Routings draw what their names say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moectl.bench import routing
from moectl.bench.shapes import Shape
from moectl.errors import InputError, UsageError


def shape(experts: int, top_k: int) -> Shape:
    return Shape(8, 8, experts, top_k, "test")


def draw(text: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    return routing.make(text, shape(experts, top_k))(tokens, torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(["uniform", "balanced", "zipf:1.2", "zipf:0", "zipf:8", "hot:0.5", "hot:0", "hot:1"]),
    st.integers(1, 200),
    st.integers(1, 8),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_every_token_chooses_different_experts(text, tokens, top_k, more, seed):
    index = draw(text, tokens, top_k + more, top_k, seed)
    assert index.shape == (tokens, top_k) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() < top_k + more
    assert all(len(row.unique()) == top_k for row in index)
    assert torch.equal(index, draw(text, tokens, top_k + more, top_k, seed))


@given(st.integers(1, 300), st.integers(1, 6), st.integers(0, 30))
def test_balanced_is_balanced(tokens, top_k, more):
    counts = routing.counts(draw("balanced", tokens, top_k + more, top_k), top_k + more)
    assert max(counts) - min(counts) <= 1 and sum(counts) == tokens * top_k


@given(st.integers(1, 500), st.floats(0, 1))
def test_hot_is_as_hot_as_it_says(tokens, share):
    counts = routing.counts(draw(f"hot:{share}", tokens, 64, 4), 64)
    hot = round(share * tokens)
    assert hot in counts and sum(counts) == 4 * tokens


def test_uniform_is_uniform_and_zipf_is_not():
    uniform = routing.counts(draw("uniform", 20000, 32, 2), 32)
    zipf = sorted(routing.counts(draw("zipf:1.2", 20000, 32, 1), 32), reverse=True)
    assert max(uniform) < 1.15 * min(uniform)
    odds = [rank**-1.2 for rank in range(1, 33)]
    for count, odd in list(zip(zipf, odds, strict=True))[:5]:
        assert count == pytest.approx(20000 * odd / sum(odds), rel=0.06)


def test_weights_add_up():
    index = draw("uniform", 50, 8, 3)
    assert torch.allclose(routing.weights(index, torch.Generator()).sum(-1), torch.ones(50))


@pytest.mark.parametrize("layers", [None, 3])
def test_a_trace_is_replayed(layers, tmp_path):
    index = torch.stack([torch.randperm(8)[:2] for _ in range(30)]).int()
    trace = index if layers is None else torch.stack([(index + layer) % 8 for layer in range(layers)])
    save_file({"index": trace}, tmp_path / "trace.safetensors")
    drawn = draw(f"trace:{tmp_path / 'trace.safetensors'}", 70, 8, 2)
    rows = {tuple(row) for row in trace.reshape(-1, 2).tolist()}
    assert drawn.shape == (70, 2) and {tuple(row) for row in drawn.tolist()} <= rows
    assert torch.equal(drawn[:30], drawn[30:60])  # from the start again


def test_traces_of_something_else(tmp_path):
    path = tmp_path / "trace.safetensors"
    for tensors in ({"other": torch.zeros(3, 2)}, {"index": torch.zeros(3)}, {"index": torch.full((3, 2), 8)}):
        save_file(tensors, path)
        with pytest.raises(InputError):
            draw(f"trace:{path}", 4, 8, 2)
    path.write_bytes(b"no")
    for name in (path, tmp_path / "not there"):
        with pytest.raises(InputError):
            draw(f"trace:{name}", 4, 8, 2)


@pytest.mark.parametrize(
    "text", ["", "even", "uniform:1", "zipf", "zipf:-1", "zipf:nan", "zipf:inf", "hot:1.5", "hot:", "trace:"]
)
def test_what_is_no_routing(text):
    with pytest.raises(UsageError):
        draw(text, 4, 8, 2)


def test_ids_of_other_devices_are_not_counted():
    assert routing.counts(torch.tensor([[0, -1], [7, 2]]), 4) == [1, 0, 1, 0]
