"""A matrix on disk: it comes back through a file bit for bit, and a damaged one is named and refused."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import plain_codes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moectl.codecs.blob import pack, parse
from moectl.codecs.rate import Rate, measure
from moectl.codecs.tables import QMOE
from moectl.errors import InputError

PAGE = (Path(__file__).parents[2] / "docs" / "format-qmoe.md").read_text()


def matrix(shape, dtype=ml_dtypes.bfloat16, seed=0):
    """Ternary weights and levels for them."""
    rng = np.random.default_rng(seed)
    trits = rng.choice(np.array([0, -1, 1], np.int8), p=[0.9, 0.05, 0.05], size=shape)
    return trits, rng.standard_normal((*shape[:-1], 2)).astype(dtype)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("number", [None, QMOE])
@pytest.mark.parametrize("shape", [(7, 130), (3, 5, 64), (2, 0, 9), (4, 0)])
def test_a_matrix_comes_back_through_a_file(tmp_path, shape, dtype, number):
    trits, levels = matrix(shape, dtype)
    save_file(pack(trits, levels, "mlp.up", number).tensors(), tmp_path / "a.safetensors")
    blob = parse("mlp.up", load_file(tmp_path / "a.safetensors"))
    negative, positive = levels[..., :1], levels[..., 1:]
    weights = np.where(trits < 0, negative, np.where(trits > 0, positive, dtype(0)))
    assert blob.shape == shape and blob.weights().dtype == dtype
    assert blob.weights().tobytes() == weights.tobytes()
    assert np.array_equal(blob.trits(), trits)


def test_a_transposed_parameter_is_noted_and_its_matrix_left_as_it_is():
    trits, levels = matrix((7, 130))
    plain, noted = (pack(trits, levels, "m", transposed=transposed) for transposed in (False, True))
    assert not parse("m", plain.tensors()).transposed
    again = parse("m", noted.tensors())
    assert again.transposed and again.weights().tobytes() == plain.weights().tobytes()


def test_rates_add_up():
    blobs = [
        (pack(*matrix(shape, seed=width)), matrix(shape, seed=width)[0])
        for width, shape in enumerate([(64, 500), (8, 2000)])
    ]
    rates = [measure(blob, trits) for blob, trits in blobs]
    total = sum(rates, Rate())
    on_disk = sum(
        tensor.nbytes - (16 if name.endswith("about") else 0)
        for blob, _ in blobs
        for name, tensor in blob.tensors().items()
    )
    assert total.achieved == pytest.approx(8 * on_disk / total.weights)
    assert total.rows == pytest.approx(48 * 72 / 48_000)
    assert total.entropy < total.codes < total.achieved
    assert total.headroom == pytest.approx(total.codes - total.entropy)
    assert measure(*blobs[0]).entropy == pytest.approx(entropy_by_hand(blobs[0][1]))
    assert Rate().achieved == 0


def entropy_by_hand(trits):
    """Bits per weight."""
    shares = [np.mean(trits == symbol) for symbol in (-1, 0, 1)]
    return -sum(share * np.log2(share) for share in shares)


DAMAGES = {
    "about missing": ("about", lambda t: t.pop("m.about")),
    "codes missing": ("codes", lambda t: t.pop("m.codes")),
    "counts missing": ("counts", lambda t: t.pop("m.counts")),
    "levels missing": ("levels", lambda t: t.pop("m.levels")),
    "another version": ("about", lambda t: t["m.about"].put(0, 2)),
    "unknown table": ("about", lambda t: t["m.about"].put(1, 300)),
    "negative table": ("about", lambda t: t["m.about"].put(1, -1)),
    "negative width": ("about", lambda t: t["m.about"].put(2, -1)),
    "huge width": ("codes", lambda t: t["m.about"].put(2, 2**31 - 1)),
    "wider": ("codes", lambda t: t["m.about"].put(2, 900)),
    "narrower": ("codes", lambda t: t["m.about"].put(2, 100)),
    "long about": ("about", lambda t: t.update({"m.about": np.zeros(6, np.int32)})),
    "short about": ("about", lambda t: t.update({"m.about": t["m.about"][:3]})),
    "unknown flags": ("about", lambda t: t["m.about"].put(3, 2)),
    "about of floats": ("about", lambda t: t.update({"m.about": np.ones(4, np.float32)})),
    "codes cut": ("counts", lambda t: t.update({"m.codes": t["m.codes"][:-1]})),
    "codes of another type": ("codes", lambda t: t.update({"m.codes": t["m.codes"].astype(np.int32)})),
    "codes in rows": ("codes", lambda t: t.update({"m.codes": t["m.codes"][None]})),
    "a count too many": ("counts", lambda t: t["m.counts"].put(0, 65_535)),
    "a count moved": (
        "codes",
        lambda t: t.update({"m.counts": t["m.counts"] + np.array([1, -1, 0], np.int16).astype(np.uint16)}),
    ),
    "counts of another type": ("counts", lambda t: t.update({"m.counts": t["m.counts"].astype(np.int64)})),
    "counts of a number": ("counts", lambda t: t.update({"m.counts": t["m.counts"][0]})),
    "levels of other rows": ("levels", lambda t: t.update({"m.levels": t["m.levels"][:-1]})),
    "levels of another type": ("levels", lambda t: t.update({"m.levels": t["m.levels"].astype(np.int16)})),
    "unused codeword": ("codes", lambda t: t["m.codes"].put(0, 65_535)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_matrix_is_refused_and_the_tensor_named(damage):
    part, spoil = DAMAGES[damage]
    tensors = pack(*matrix((3, 200)), "m").tensors()
    spoil(tensors)
    with pytest.raises(InputError, match=rf"^m\.{part}: "):
        parse("m", tensors).weights()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_bytes_changed_anywhere_give_a_matrix_or_an_input_error(seed, changes):
    rng = np.random.default_rng(seed)
    tensors = pack(*matrix((6, 150), seed=seed), "m").tensors()
    for _ in range(changes):
        raw = tensors[f"m.{rng.choice(['about', 'codes', 'counts'], p=[0.05, 0.85, 0.1])}"].view(np.uint8).reshape(-1)
        raw[rng.integers(len(raw))] = rng.integers(256)
    try:
        blob = parse("m", tensors)
        weights = blob.weights()
    except InputError:
        return
    assert weights.shape == blob.shape


def test_a_control_character_in_a_name_does_not_reach_the_terminal():
    with pytest.raises(InputError) as caught:
        parse("\x1b[31m", {})
    assert "\x1b" not in caught.value.what


def test_levels_must_fit_the_weights():
    trits, levels = matrix((3, 200))
    for wrong in (levels[:2], levels.astype(np.float64), levels[:, :1]):
        with pytest.raises(ValueError, match="levels are"):
            pack(trits, wrong)
    with pytest.raises(ValueError, match="levels are"):
        pack(trits[0], levels[0])


def test_the_pages_example():
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL).group(1))
    trits = np.array(example["weights"], np.int8)
    codes, counts = plain_codes.encode(trits, example["about"][1])
    assert (codes, counts) == (example["codes"], example["counts"])
    blob = pack(trits, np.array(example["levels"], np.float32), number=example["about"][1])
    tensors = [blob.tensors()[f"the matrix.{part}"].tolist() for part in ("about", "codes", "counts")]
    assert tensors == [example["about"], codes, counts]
