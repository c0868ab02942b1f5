"""Uniform grids on disk: they come back bit for bit, a second implementation agrees, and damage is named."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import plain_grid
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moectl.codecs import matrix
from moectl.codecs.grid import pack, parse
from moectl.errors import InputError

PAGE = (Path(__file__).parents[2] / "docs" / "format-qmoe.md").read_text()
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def drawn(shape, bits, group, dtype=ml_dtypes.bfloat16, seed=0):
    """Numbers, scales and zeros."""
    rng = np.random.default_rng(seed)
    groups = (*shape[:-1], -(-shape[-1] // group))
    numbers = rng.integers(1 << bits, size=shape, dtype=np.uint8)
    scales = (rng.standard_normal(groups) * 0.02).astype(dtype)
    return numbers, scales, rng.integers(1 << bits, size=groups, dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 300), st.integers(1, 310), st.sampled_from([2, 3, 4]), st.sampled_from(DTYPES),
    st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_it_agrees_with_a_second_implementation(rows, width, group, bits, dtype, symmetric, seed):
    numbers, scales, points = drawn((rows, width), bits, group, dtype, seed)
    if symmetric:
        points[:] = 1 << bits - 1
    blob = parse("m", pack(numbers, scales, None if symmetric else points, bits, group, "m").tensors())
    assert blob.packed.tolist() == plain_grid.pack(numbers.tolist(), bits)
    assert symmetric or blob.zeros.tolist() == plain_grid.pack(points.tolist(), bits)
    assert plain_grid.unpack(blob.packed.tolist(), bits, width) == numbers.tolist() == blob.numbers().tolist()
    assert np.array_equal(blob.points(), points)
    expected = plain_grid.weights(numbers, scales, points, group)
    assert blob.weights().dtype == expected.dtype and blob.weights().tobytes() == expected.tobytes()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 100), (2, 0, 9), (4, 0)])
def test_it_comes_back_through_a_file(tmp_path, shape, dtype, symmetric):
    numbers, scales, points = drawn(shape, 3, 32, dtype)
    blob = pack(numbers, scales, None if symmetric else points, 3, 32, "mlp.up", transposed=True)
    save_file(blob.tensors(), tmp_path / "a.safetensors")
    again = matrix.parse("mlp.up", load_file(tmp_path / "a.safetensors"))
    assert again.shape == shape and again.transposed and (again.zeros is None) == symmetric
    assert again.weights().tobytes() == blob.weights().tobytes() and again.weights().shape == shape


def test_the_pages_example():
    example = json.loads(re.search(r"```json grid\n(.*?)```", PAGE, re.DOTALL).group(1))
    numbers, points = (np.array(example[key], np.uint8) for key in ("numbers", "points"))
    blob = pack(numbers, np.array(example["scales"], np.float32), points, *example["about"][1::2], "m")
    for part in ("about", "packed", "zeros"):
        assert blob.tensors()[f"m.{part}"].tolist() == example[part]


DAMAGES = {
    "about missing": ("about", lambda t: t.pop("m.about")),
    "packed missing": ("packed", lambda t: t.pop("m.packed")),
    "scales missing": ("scales", lambda t: t.pop("m.scales")),
    "another version": ("about", lambda t: t["m.about"].put(0, 2)),
    "5 bits": ("about", lambda t: t["m.about"].put(1, 5)),
    "3 bits": ("packed", lambda t: t["m.about"].put(1, 3)),
    "negative width": ("about", lambda t: t["m.about"].put(2, -1)),
    "wider": ("scales", lambda t: t["m.about"].put(2, 2**31 - 1)),
    "a little wider": ("packed", lambda t: t["m.about"].put(2, 94)),
    "groups of none": ("about", lambda t: t["m.about"].put(3, 0)),
    "other groups": ("scales", lambda t: t["m.about"].put(3, 16)),
    "unknown flags": ("about", lambda t: t["m.about"].put(4, 2)),
    "about of a ternary matrix": ("about", lambda t: t.update({"m.about": t["m.about"][:4]})),
    "packed of other rows": ("packed", lambda t: t.update({"m.packed": t["m.packed"][:-1]})),
    "packed of another type": ("packed", lambda t: t.update({"m.packed": t["m.packed"].astype(np.int16)})),
    "zeros of another type": ("zeros", lambda t: t.update({"m.zeros": t["m.zeros"].view(np.int8)})),
    "zeros of other groups": ("zeros", lambda t: t.update({"m.zeros": t["m.zeros"][:, :1]})),
    "scales of another type": ("scales", lambda t: t.update({"m.scales": t["m.scales"].astype(np.float64)})),
    "scales of a row": ("scales", lambda t: t.update({"m.scales": t["m.scales"][0]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_matrix_is_refused_and_the_tensor_named(damage):
    part, spoil = DAMAGES[damage]
    tensors = pack(*drawn((3, 90), 4, 32), 4, 32, "m").tensors()
    spoil(tensors)
    with pytest.raises(InputError, match=rf"^m\.{part}: "):
        matrix.parse("m", tensors).weights()


def test_numbers_must_fit():
    numbers, scales, points = drawn((3, 90), 4, 32)
    wrong = {
        "numbers of 3 bits": (numbers, scales, points, 3, 32),
        "numbers of 4 bits are uint8": (numbers.astype(np.int64), scales, points, 4, 32),
        "scales are": (numbers, scales[:, :1], points, 4, 32),
        "scales are float64": (numbers, scales.astype(np.float64), points, 4, 32),
        "for weights": (numbers, scales, points[:, :1], 4, 32),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            pack(*arguments)
