"""Expressions equal whole-array numpy, in any chunking; extents are the very bytes; casts round once."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from files import checkpoint, random_array
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moectl.checkpoint import evaluate as evaluation
from moectl.checkpoint.evaluate import cast, evaluate
from moectl.checkpoint.expressions import (
    AddLowRank,
    Concat,
    Copy,
    Expression,
    Index,
    Init,
    Literal,
    Mean,
    Noise,
    Redraw,
    RowMean,
    Scale,
    Shuffle,
    Slice,
    Stack,
    extents,
    from_json,
    leaves,
    shape_of,
    to_json,
)
from moectl.checkpoint.plan import OutputTensor
from moectl.checkpoint.randomness import BLOCK, normal, permutation, uniform
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError

ARRAYS = {
    "matrix": random_array((6, 5), seed=1),
    "other": random_array((6, 5), seed=2),
    "half": random_array((6, 5), "bfloat16", seed=3),
    "cube": random_array((3, 6, 5), seed=4),
    "left": random_array((6, 2), seed=5),
    "right": random_array((2, 5), seed=6),
    "vector": random_array((7,), seed=7),
    "scalar": random_array((), seed=8),
}
SEED = 11


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(checkpoint(tmp_path_factory.mktemp("source") / "model", ARRAYS))


def brute_force(x: Expression) -> np.ndarray:
    """The definition, on whole arrays."""
    match x:
        case Copy():
            return ARRAYS[x.tensor].astype(np.float64)
        case Index(index=int(i)):
            return np.take(brute_force(x.x), i, axis=x.dim)
        case Index():
            return np.take(brute_force(x.x), np.array(x.index, int), axis=x.dim)
        case Slice():
            return np.take(brute_force(x.x), np.arange(x.start, x.stop), axis=x.dim)
        case Stack():
            return np.stack([brute_force(part) for part in x.parts])
        case Concat():
            return np.concatenate([brute_force(part) for part in x.parts], axis=x.dim)
        case Mean():
            return np.average(np.stack([brute_force(part) for part in x.parts]), axis=0, weights=x.weights)
        case RowMean():
            return brute_force(x.x).mean(axis=0, keepdims=True)
        case Scale():
            return x.factor * brute_force(x.x)
        case AddLowRank():
            return brute_force(x.x) + x.scale * (brute_force(x.b) @ brute_force(x.a))
        case Noise():
            inner = brute_force(x.x)
            return inner + x.std * normal(SEED, x.key, 0, inner.size).reshape(inner.shape)
        case Shuffle():
            inner = brute_force(x.x)
            return np.take(inner, permutation(SEED, x.key, inner.shape[x.dim]), axis=x.dim)
        case Redraw():
            inner = brute_force(x.x).copy()
            if x.dim is None:
                which = uniform(SEED, f"{x.key}/which", 0, inner.size).reshape(inner.shape) < x.fraction
            else:
                size = inner.shape[x.dim]
                chosen = set(permutation(SEED, x.choice, size)[: round(x.fraction * size)].tolist())
                which = np.array([index[x.dim] in chosen for index in np.ndindex(inner.shape)]).reshape(inner.shape)
            if which.any():
                draws = normal(SEED, x.key, 0, inner.size).reshape(inner.shape)
                inner[which] = inner[which].mean() + inner[which].std() * draws[which]
            return inner
        case Init():
            return x.std * normal(SEED, x.key, 0, math.prod(x.shape)).reshape(x.shape)
        case Literal():
            return np.full(x.shape, x.value)


def computed(x: Expression, source: Checkpoint, dtype: str) -> bytes:
    return b"".join(evaluate(OutputTensor("x", dtype, shape_of(x, (source,)), x), (source,), SEED))


def slices(x: Expression, rows: int, columns: int) -> st.SearchStrategy[Expression]:
    def build(dim: int, a: int, b: int) -> Expression:
        size = (rows, columns)[dim]
        return Slice(x, dim, min(a % size, b % size), max(a % size, b % size) + 1)

    return st.builds(build, st.integers(0, 1), st.integers(0, 50), st.integers(0, 50))


LEAVES: st.SearchStrategy[Expression] = st.sampled_from(
    [
        Copy("matrix"),
        Copy("other"),
        Copy("half"),
        Index(Copy("cube"), 0, 2),
        Index(Copy("cube"), 0, 0),
        Init((6, 5), 0.5, "init"),
        Literal((6, 5), 2.0),
        AddLowRank(Copy("matrix"), Copy("left"), Copy("right"), 0.25),
    ]
)
GATHERS = st.lists(st.integers(0, 4), min_size=5, max_size=5).map(tuple)


def grow(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    """Operations that keep the shape [6, 5], so that they nest freely."""
    return st.one_of(
        st.builds(lambda a, n: Concat((Slice(a, 0, 0, n), *(RowMean(a),) * (6 - n)), 0), inner, st.integers(3, 5)),
        st.builds(Scale, inner, st.sampled_from([0.5, -3.0])),
        st.builds(Noise, inner, st.just(0.1), st.sampled_from(["k1", "k2"])),
        st.builds(lambda a, b: Mean((a, b)), inner, inner),
        st.builds(lambda a, b: Mean((a, b), (0.25, 2.0)), inner, inner),
        st.builds(lambda a, b, i: Index(Stack((a, b)), 0, i), inner, inner, st.integers(0, 1)),
        st.builds(Shuffle, inner, st.sampled_from([0, 1]), st.sampled_from(["k1", "k2"])),
        st.builds(Redraw, inner, st.sampled_from([0.0, 0.5, 1.0]), st.just("new"), st.sampled_from([None, 0, 1])),
        st.builds(lambda x, i: Index(x, 1, i), inner, GATHERS),
        st.builds(lambda x, i: Index(x, 0, (*i, 5)), inner, GATHERS),
        st.builds(lambda a, b, n: Concat((Slice(a, 0, 0, n), Slice(b, 0, n, 6)), 0), inner, inner, st.integers(0, 6)),
        st.builds(lambda a, b, n: Concat((Slice(a, 1, 0, n), Slice(b, 1, n, 5)), 1), inner, inner, st.integers(1, 4)),
    )


TREES = st.recursive(LEAVES, grow, max_leaves=6).flatmap(
    lambda x: st.one_of(st.just(x), st.just(Stack((x, Copy("other")))), slices(x, 6, 5))
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES, chunk=st.sampled_from([1, 7, 10, 1 << 20]))
def test_any_tree_in_any_chunking_equals_numpy(tree: Expression, chunk: int, source: Checkpoint) -> None:
    expected = brute_force(tree)
    assert shape_of(tree, (source,)) == expected.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHUNK_ELEMENTS", chunk)
        raw = computed(tree, source, "F64")
    found = np.frombuffer(raw, "<f8").reshape(expected.shape)
    assert np.allclose(found, expected, rtol=1e-11, atol=1e-11)
    assert from_json(to_json(tree)) == tree
    dtypes = {source.tensors[leaf.tensor].dtype for leaf in leaves(tree)}
    ranges = extents(tree, (source,), dtypes.pop()) if len(dtypes) == 1 else None
    if ranges is not None:
        stored = b"".join(Path(e.file).read_bytes()[e.offset : e.offset + e.nbytes] for e in ranges)
        dtype = "bfloat16" if "half" in {leaf.tensor for leaf in leaves(tree)} else "float32"
        assert stored == expected.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).tobytes()


@pytest.mark.parametrize("name", ["vector", "scalar"])
def test_tensors_of_few_dimensions(name: str, source: Checkpoint) -> None:
    assert computed(Scale(Copy(name), 2.0), source, "F32") == (2 * ARRAYS[name]).tobytes()


def test_contiguous_parts_are_extents_and_others_are_not(source: Checkpoint) -> None:
    assert extents(Slice(Index(Copy("cube"), 0, 1), 0, 2, 4), (source,), "F32") is not None
    assert extents(Concat((Copy("matrix"), Slice(Copy("other"), 0, 0, 1)), 0), (source,), "F32") is not None
    for x in (
        Slice(Copy("matrix"), 1, 0, 2),
        Scale(Copy("matrix"), 1.0),
        Concat((Copy("matrix"), Init((1, 5), 1, "k")), 0),
    ):
        assert extents(x, (source,), "F32") is None
    assert extents(Copy("matrix"), (source,), "BF16") is None


@given(start=st.integers(0, 3 * BLOCK), length=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_draws_are_a_function_of_position(start: int, length: int) -> None:
    whole = test_draws_are_a_function_of_position.whole  # type: ignore[attr-defined]
    assert np.array_equal(normal(3, "key", start, start + length), whole[start : start + length])


test_draws_are_a_function_of_position.whole = normal(3, "key", 0, 4 * BLOCK)  # type: ignore[attr-defined]


def test_draws_are_normal_and_differ_by_seed_and_key() -> None:
    draws = normal(0, "a", 0, 10**6)
    assert abs(draws.mean()) < 5e-3 and abs(draws.std() - 1) < 5e-3 and abs((draws**4).mean() - 3) < 0.05
    others = [normal(1, "a", 0, 10**6), normal(0, "b", 0, 10**6), np.roll(draws, BLOCK)]
    assert all(abs(np.corrcoef(draws, other)[0, 1]) < 5e-3 for other in others)


def test_draws_do_not_move_between_versions() -> None:
    """Published checkpoints are reproducible only while these numbers stay."""
    expected = [0.8045290688401442, 0.005427995153981729, 0.3785823779103839]
    assert normal(0, "model.layers.0.mlp.gate.weight", 0, 3).tolist() == expected


def nearest(value: float, dtype: np.dtype) -> float:
    """The nearest (ties to even) number of a 16-bit type, by exact rational comparison with its neighbours."""
    guess = np.float32(value).astype(dtype)
    bits = int(guess.view(np.uint16))
    candidates = [np.uint16(b).view(dtype) for b in (bits - 1, bits, bits + 1) if 0 <= b < 2**16]
    finite = [c for c in candidates if np.isfinite(np.float64(c))]
    return float(min(finite, key=lambda c: (abs(Fraction(float(c)) - Fraction(value)), int(c.view(np.uint16)) & 1)))


@settings(max_examples=500, deadline=None)
@given(st.floats(-1e30, 1e30, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-30))
def test_bfloat16_is_rounded_once(value: float) -> None:
    assert float(cast(np.array([value]), "BF16")[0]) == nearest(value, np.dtype(ml_dtypes.bfloat16))


def test_rounding_twice_would_be_noticed() -> None:
    """1 + 2^-8 + 2^-40 is above the tie, but through float32 it lands on it and falls to 1."""
    value = 1 + 2.0**-8 + 2.0**-40
    assert float(cast(np.array([value]), "BF16")[0]) == 1 + 2.0**-7
    assert float(np.array([value]).astype(ml_dtypes.bfloat16)[0]) == 1.0
    assert float(cast(np.array([-value]), "BF16")[0]) == -(1 + 2.0**-7)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300])
def test_special_values_cast_as_ieee_says(value: float) -> None:
    found = cast(np.array([value]), "BF16")[0]
    with np.errstate(over="ignore"):
        expected = np.float32(value).astype(ml_dtypes.bfloat16)
    assert found.tobytes() == expected.tobytes() or (math.isnan(value) and np.isnan(np.float64(found)))


def test_a_mean_is_a_float64_mean_rounded_once(tmp_path: Path) -> None:
    parts = {name: random_array((64, 33), "bfloat16", seed) for seed, name in enumerate("abc")}
    source = Checkpoint.open(checkpoint(tmp_path / "m", parts))
    raw = computed(Mean(tuple(Copy(name) for name in parts)), source, "BF16")
    exact = sum(array.astype(np.float64) for array in parts.values()) / 3
    expected = [nearest(value, np.dtype(ml_dtypes.bfloat16)) for value in exact.ravel()]
    assert np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float64).tolist() == expected


def test_what_does_not_fit_the_type_stops_by_name(tmp_path: Path) -> None:
    values = np.array([[1e5, 1.0], [2.0, np.nan]], dtype="float32")
    source = Checkpoint.open(checkpoint(tmp_path / "m", {"big": values[:1], "nan": values[1:]}))
    for name, dtype in (("big", "F16"), ("nan", "BF16")):
        with pytest.raises(InputError, match=f"'x' would hold NaN or infinite values as {dtype}"):
            computed(Copy(name), source, dtype)
    assert computed(Copy("big"), source, "BF16")
