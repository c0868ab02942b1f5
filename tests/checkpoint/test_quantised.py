"""Quantised weights become the numbers their formats define: transformers' own, or a loop's where it has none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moectl.checkpoint import evaluate as evaluation
from moectl.checkpoint import quantised
from moectl.checkpoint.dtypes import numpy_dtype
from moectl.checkpoint.evaluate import evaluate
from moectl.checkpoint.expressions import (
    Concat,
    Copy,
    Dequantise,
    Expression,
    Scale,
    Slice,
    Stack,
    extents,
    from_json,
    leaves,
    shape_of,
    substituted,
    to_json,
)
from moectl.checkpoint.plan import OutputTensor, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CHUNKS = (1, 700, 1 << 20)


def opened(directory: Path, **tensors: torch.Tensor) -> Checkpoint:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return Checkpoint.open(directory)


def computed(x: Expression, source: Checkpoint, dtype: str = "F32", chunk: int = 1 << 20) -> np.ndarray:
    assert from_json(json.loads(json.dumps(to_json(x)))) == x
    tensor = planned("x", x, (source,), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHUNK_ELEMENTS", chunk)
        raw = b"".join(evaluate(tensor, (source,), seed=0))
    return np.frombuffer(raw, numpy_dtype(dtype)).reshape(tensor.shape)


def same_bits(found: np.ndarray, expected: torch.Tensor | np.ndarray) -> bool:
    if isinstance(expected, torch.Tensor):
        expected = expected.float().numpy()
    return found.shape == expected.shape and found.astype(np.float32).tobytes() == expected.astype("f4").tobytes()


def random_float8(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every finite code occurs, negative zero and subnormals too."""
    octets = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    values = octets.view(dtype)
    return torch.where(values.float().isfinite(), octets, 0).to(torch.uint8).view(dtype)


def positive(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


# FP8


@pytest.mark.parametrize("values_type", list(FLOAT8))
@pytest.mark.parametrize("scales_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_are_what_transformers_makes_of_them(
    values_type: str, scales_type: torch.dtype, tmp_path: Path
) -> None:
    values = random_float8((384, 256), FLOAT8[values_type], seed=1)
    scales = positive((3, 2), seed=2).to(scales_type)
    source = opened(tmp_path, w=values, s=scales)
    x = Dequantise(Copy("w"), Copy("s"), "float8", (384, 256), (128, 128))
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        expected = Fp8Dequantize(None)._dequantize_one(values, scales, dtype)
        for chunk in CHUNKS:
            assert same_bits(computed(x, source, name, chunk), expected)


def fp8_loop(values: torch.Tensor, scales: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
    result = values.float()
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            result[i, j] = result[i, j] * scales[i // tall, j // wide].float()
    return result


@pytest.mark.parametrize("shape", [(200, 130), (129, 128), (5, 300), (1, 1)])
def test_fp8_blocks_at_the_edge_are_cut(shape: tuple[int, int], tmp_path: Path) -> None:
    """DeepSeek's kernel masks the last blocks; transformers 5.23 stretches them (200 rows: two blocks of 100)."""
    values = random_float8(shape, torch.float8_e4m3fn, seed=3)
    scales = positive((math.ceil(shape[0] / 128), math.ceil(shape[1] / 128)), seed=4)
    source = opened(tmp_path, w=values, s=scales)
    x = Dequantise(Copy("w"), Copy("s"), "float8", shape, (128, 128))
    expected = fp8_loop(values, scales, 128, 128)
    for chunk in CHUNKS:
        assert same_bits(computed(x, source, chunk=chunk), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale_per_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = random_float8((30, 20), torch.float8_e4m3fn, seed=5)
    scale = positive((1,), seed=6).reshape(shape)
    source = opened(tmp_path, w=values, s=scale)
    x = Dequantise(Copy("w"), Copy("s"), "float8", (30, 20), (30, 20))
    assert same_bits(computed(x, source, chunk=100), Fp8Dequantize(None)._dequantize_one(values, scale.reshape(1, 1)))


def test_scale_bytes_are_exponents(tmp_path: Path) -> None:
    values = random_float8((32, 32), torch.float8_e4m3fn, seed=7)
    scales = torch.tensor([[100, 127], [0, 140]], dtype=torch.uint8)
    source = opened(tmp_path, w=values, s=scales)
    x = Dequantise(Copy("w"), Copy("s"), "float8", (32, 32), (16, 16))
    assert same_bits(computed(x, source), Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32))


def test_an_undefined_code_stops_by_name(tmp_path: Path) -> None:
    values = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    source = opened(tmp_path, w=values, s=torch.ones(1, 1))
    with pytest.raises(InputError, match="would hold NaN"):
        computed(Dequantise(Copy("w"), Copy("s"), "float8", (4, 4), (4, 4)), source)


def test_transposed_scales_are_noticed(tmp_path: Path) -> None:
    values = random_float8((256, 256), torch.float8_e4m3fn, seed=8)
    scales = positive((2, 2), seed=9)
    source = opened(tmp_path, w=values, s=scales.T)
    x = Dequantise(Copy("w"), Copy("s"), "float8", (256, 256), (128, 128))
    assert not same_bits(computed(x, source), Fp8Dequantize(None)._dequantize_one(values, scales))


# packed integers


def pack(values: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """Signed integers packed in int32, by the format's own words: shift to unsigned, first in the lowest bits."""
    each = 32 // bits
    moved = np.moveaxis(values, dim, -1)
    result = np.zeros((*moved.shape[:-1], math.ceil(moved.shape[-1] / each)), dtype=np.uint32)
    for i in range(moved.shape[-1]):
        code = (moved[..., i].astype(np.int64) + 2 ** (bits - 1)).astype(np.uint32)
        result[..., i // each] |= code << np.uint32(bits * (i % each))
    return np.ascontiguousarray(np.moveaxis(result.view(np.int32), -1, dim))


def packed_case(
    rows: int, columns: int, group: int | None, bits: int, asymmetric: bool, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Tensors, and in the last place what they mean, element by element."""
    random = np.random.default_rng(seed)
    wide = group or columns
    groups = math.ceil(columns / wide)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = random.integers(low, high, (rows, columns))
    zeros = random.integers(low, high, (rows, groups)) if asymmetric else np.zeros((rows, groups), int)
    scales = random.uniform(1e-3, 1e-1, (rows, groups)).astype(ml_dtypes.bfloat16)
    expected = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            expected[i, j] = np.float32(int(values[i, j]) - int(zeros[i, j // wide])) * np.float32(scales[i, j // wide])
    tensors = {"p": pack(values, bits, 1), "s": scales, "z": pack(zeros, bits, 0), "z8": zeros.astype(np.int8)}
    return tensors, expected, wide


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.integers(1, 70),
    group=st.sampled_from([None, 1, 3, 8, 16, 32]),
    bits=st.sampled_from([4, 8]),
    asymmetric=st.booleans(),
    chunk=st.sampled_from([1, 50, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_packed_integers_are_what_a_loop_makes_of_them(
    rows: int,
    columns: int,
    group: int | None,
    bits: int,
    asymmetric: bool,
    chunk: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tensors, expected, wide = packed_case(rows, columns, group, bits, asymmetric, seed)
    source = opened(tmp_path_factory.mktemp("packed"), **{name: tensor(array) for name, array in tensors.items()})
    for zeros in ("z", "z8") if asymmetric else (None,):
        x = Dequantise(Copy("p"), Copy("s"), f"int{bits}", (rows, columns), (1, wide), Copy(zeros) if zeros else None)
        assert same_bits(computed(x, source, "F32", chunk), expected)
        expected_bf16 = expected.astype(ml_dtypes.bfloat16)  # the product of 9 and 8 bits is exact in float32
        assert computed(x, source, "BF16", chunk).tobytes() == expected_bf16.tobytes()


def test_columns_in_another_order_keep_their_group(tmp_path: Path) -> None:
    """Activation ordering: `g_idx` says which group a column was quantised in."""
    tensors, *_ = packed_case(12, 32, 8, 4, True, seed=1)
    order = np.random.default_rng(2).permutation(32)
    groups = np.empty(32, np.int32)
    groups[order] = np.arange(32) // 8
    source = opened(
        tmp_path,
        **{name: tensor(array) for name, array in tensors.items()},
        g=tensor(groups),
        unset=torch.full((32,), -1, dtype=torch.int32),
        beyond=torch.full((32,), 4, dtype=torch.int32),
    )

    def ordered(name: str | None) -> Dequantise:
        return Dequantise(Copy("p"), Copy("s"), "int4", (12, 32), (1, 8), Copy("z"), Copy(name) if name else None)

    words = tensors["p"].view(np.uint32)
    expected = np.empty((12, 32), np.float32)
    for i in range(12):
        for j in range(32):
            code = int(words[i, j // 8]) >> (4 * (j % 8)) & 15
            expected[i, j] = np.float32(code - 8 - int(tensors["z8"][i, groups[j]])) * np.float32(
                tensors["s"][i, groups[j]]
            )
    for chunk in CHUNKS:
        assert same_bits(computed(ordered("g"), source, chunk=chunk), expected)
    assert same_bits(computed(ordered("unset"), source), computed(ordered(None), source))
    with pytest.raises(InputError, match="tensor 'beyond' holds 4 to 4, expected groups from 0 to 3"):
        computed(ordered("beyond"), source)


@pytest.mark.parametrize("spoil", ["nibbles", "offset", "zero points"])
def test_the_usual_mistakes_are_noticed(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, expected, wide = packed_case(16, 32, 8, 4, True, seed=3)
    source = opened(tmp_path, **{name: tensor(array) for name, array in tensors.items()})
    x = Dequantise(Copy("p"), Copy("s"), "int4", (16, 32), (1, wide), Copy("z"))
    assert same_bits(computed(x, source), expected)
    match spoil:
        case "nibbles":
            table = np.ascontiguousarray(quantised._pair_table("int4")[:, ::-1])
            monkeypatch.setattr(quantised, "_pair_table", lambda coding: table)
        case "offset":
            x = Dequantise(x.values, x.scales, x.coding, x.shape, x.block)
        case "zero points":
            monkeypatch.setattr(
                quantised, "numbers_of_columns", lambda raw, coding: quantised.numbers(raw, coding).reshape(-1, 4)
            )
    assert not same_bits(computed(x, source), expected)


# MXFP4


def mxfp4(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
    return blocks, torch.randint(100, 140, shape, generator=random, dtype=torch.uint8)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """transformers returns experts transposed, [E, 32 G, O]."""
    blocks, scales = mxfp4((3, 10, 4), seed=1)
    source = opened(tmp_path, b=blocks, s=scales)
    x = Dequantise(Copy("b"), Copy("s"), "mxfp4", (3, 10, 128), (1, 32))
    for name, dtype in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        for chunk in CHUNKS:
            assert same_bits(computed(x, source, name, chunk), expected)
    assert not same_bits(computed(x, source), convert_moe_packed_tensors(blocks >> 4 | blocks << 4, scales))


def test_mxfp4_matrix(tmp_path: Path) -> None:
    blocks, scales = mxfp4((10, 4), seed=2)
    source = opened(tmp_path, b=blocks, s=scales)
    x = Dequantise(Copy("b"), Copy("s"), "mxfp4", (10, 128), (1, 32))
    expected = convert_moe_packed_tensors(blocks[None], scales[None]).transpose(1, 2)[0]
    assert same_bits(computed(x, source, "BF16", 130), expected)


@pytest.mark.parametrize("exponent", [0, 1, 254])
def test_mxfp4_extreme_scales(exponent: int, tmp_path: Path) -> None:
    blocks = torch.tensor([[[0x21, *[0] * 15]]], dtype=torch.uint8)
    source = opened(tmp_path, b=blocks, s=torch.tensor([[exponent]], dtype=torch.uint8))
    found = computed(Dequantise(Copy("b"), Copy("s"), "mxfp4", (1, 32), (1, 32)), source)
    assert found[0, :3].tolist() == [math.ldexp(0.5, exponent - 127), math.ldexp(1.0, exponent - 127), 0.0]


# in larger expressions


def test_dequantised_weights_nest_and_are_never_copied_as_they_are(tmp_path: Path) -> None:
    values = random_float8((256, 128), torch.float8_e4m3fn, seed=1)
    scales = positive((2, 1), seed=2)
    source = opened(tmp_path, w=values, s=scales, plain=torch.ones(4, 128))
    x = Dequantise(Copy("w"), Copy("s"), "float8", (256, 128), (128, 128))
    whole = computed(x, source)
    assert same_bits(computed(Slice(x, 0, 100, 140), source, chunk=200), whole[100:140])
    assert same_bits(computed(Slice(x, 1, 3, 5), source, chunk=200), whole[:, 3:5])
    assert same_bits(computed(Stack((x, x)), source), np.stack([whole, whole]))
    joined = np.concatenate([whole, np.ones((4, 128), "f4")])
    assert same_bits(computed(Concat((x, Copy("plain")), 0), source), joined)
    for dtype in ("F8_E4M3", "F32"):
        assert extents(x, (source,), dtype) is None
    assert [leaf.tensor for leaf in leaves(x)] == ["w", "s"]
    named = substituted(Stack((Scale(Slice(Copy("name"), 0, 0, 2), 2.0), Copy("other"))), {"name": x})
    assert named == Stack((Scale(Slice(x, 0, 0, 2), 2.0), Copy("other")))


def test_memory_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    import tracemalloc

    def peak(rows: int) -> int:
        source = opened(
            tmp_path / str(rows),
            w=torch.zeros(rows, 2048, dtype=torch.uint8).view(torch.float8_e4m3fn),
            s=torch.ones(rows // 128, 16),
        )
        x = Dequantise(Copy("w"), Copy("s"), "float8", (rows, 2048), (128, 128))
        out = OutputTensor("x", "BF16", shape_of(x, (source,)), x)
        tracemalloc.start()
        for _ in evaluate(out, (source,), 0):
            pass
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(8192) < 1.1 * peak(1024)
