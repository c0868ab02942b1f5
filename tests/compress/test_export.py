"""Exports to compressed-tensors: the same numbers, under the names of the family, and plain transformers loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.codecs import blob, grid
from moectl.compress.decoding import Decoding
from moectl.compress.decompress import plan_decompress
from moectl.compress.export import Packing, export_tensors, foreseen, imagined_tensors, packing
from moectl.errors import InputError, UsageError
from moectl.families.backend import experts_classes
from moectl.families.tiny_moe import model_types, tiny_inputs, tiny_moe
from moectl.integrations.qmoe.arrays import array_of, tensor_of
from moectl.layerwise.quiet import quiet

SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256}
EXPERTS = ("gate_up_proj", "down_proj")

LOAD = """
import json, sys, torch, compressed_tensors
from transformers import AutoModelForCausalLM
answers = {}
for place in sys.argv[1:]:
    exported, info = AutoModelForCausalLM.from_pretrained(f"{place}/exported", output_loading_info=True)
    plain = AutoModelForCausalLM.from_pretrained(f"{place}/plain")
    ids = torch.load(f"{place}/ids.pt")
    with torch.no_grad():
        found, expected = exported(ids).logits, plain(ids).logits
    assert "moectl" not in sys.modules
    answers[place] = {
        "keys": [str(key) for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]],
        "same_type": found.dtype == expected.dtype,
        "difference": (found - expected).abs().max().item(),
    }
print(json.dumps(answers))
"""


def random_grid(name: str, shape: tuple[int, ...], bits: int, group: int, dtype: Any, seed: int = 0) -> grid.GridBlob:
    draw = np.random.default_rng([seed, *name.encode()])
    width = shape[-1]
    size = width if group == -1 else group
    scales = draw.uniform(0.02, 0.06, (*shape[:-1], -(-width // size))).astype(dtype)
    return grid.pack(draw.integers(0, 1 << bits, shape, np.uint8), scales, None, bits, size, name)


def random_ternary(name: str, shape: tuple[int, ...], levels: tuple[float, float] = (-1, 1)) -> blob.Blob:
    draw = np.random.default_rng([1, *name.encode()])
    trits = draw.choice(np.array([-1, 0, 1], np.int8), shape, p=[0.2, 0.6, 0.2])
    return blob.pack(trits, (draw.uniform(0.05, 0.2, (*shape[:-1], 1)) * levels).astype(np.float32), name)


def unpacked(packed: np.ndarray, bits: int, shape: np.ndarray) -> np.ndarray:
    """Written from the description of the format, one bit after another."""
    every = np.unpackbits(packed.astype("<i4").view(np.uint8), axis=-1, bitorder="little")
    rows, width = shape.tolist()
    return every[:, : width * bits].reshape(rows, width, bits) @ (1 << np.arange(bits)) - (1 << bits - 1)


def exported_case(place: Path, family: str, form: str, levels: str, dtype: str) -> None:
    """A coded checkpoint of random weights, its export, and a plain one with its weights."""
    model = tiny_moe(family, **SIZES).to(getattr(torch, dtype))
    model.config.dtype = dtype
    coded: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERTS):
            shape, floats = tuple(parameter.shape), np.float32 if dtype == "float32" else ml_dtypes.bfloat16
            if levels == "ternary":
                coded[name] = random_ternary(name, shape)
            else:
                coded[name] = random_grid(name, shape, int(form[1]), int(levels), floats)
            parameter.data = tensor_of(coded[name].weights())
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in coded}
    with quiet():
        model.save_pretrained(place / "plain")
        model.save_pretrained(place / "coded", state_dict=rest)
    file, config_file = place / "coded" / "model.safetensors", place / "coded" / "config.json"
    parts = {name: array for made in coded.values() for name, array in made.tensors().items()}
    save_file(load_file(file) | parts, file, {"format": "pt"})
    config = json.loads(config_file.read_text()) | {"quantization_config": {"quant_method": "qmoe", "version": 1}}
    config_file.write_text(json.dumps(config))

    write(plan_decompress(Decoding.of(Checkpoint.open(place / "coded"), form), "auto", 10**9), place / "exported")
    torch.save(tiny_inputs(model)["input_ids"], place / "ids.pt")


def test_transformers_loads_what_is_exported(tmp_path: Path) -> None:
    """In a process of its own that has never heard of moectl: every key, and the logits of the decoded weights.

    One number that is changed in one of 48 matrices shows a hundred times above what is allowed.
    """
    cases = [
        ("mixtral", "w4a16", "128", "float32"),
        ("mixtral", "w2a16", "64", "float32"),
        ("mixtral", "w2a16", "128", "bfloat16"),
        ("qwen3_moe", "w2a16", "128", "float32"),
        ("qwen3_moe", "w4a16", "-1", "float32"),
        ("qwen3_moe", "w4a16", "32", "bfloat16"),
        ("qwen3_moe", "w2a16", "ternary", "float32"),
    ]
    places = [tmp_path / "-".join(case) for case in cases]
    for place, case in zip(places, cases, strict=True):
        exported_case(place, *case)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(places[0], spoilt)
    weights = load_file(spoilt / "exported" / "model.safetensors")
    for expert in range(8):
        weights[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight_packed"][7, 3] ^= 0b1000
    save_file(weights, spoilt / "exported" / "model.safetensors", {"format": "pt"})

    command = [sys.executable, "-c", LOAD, *map(str, [*places, spoilt])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert answers.pop(str(spoilt))["difference"] > 1e-3
    for place, answer in answers.items():
        assert not answer["keys"] and answer["same_type"], (place, answer)
        assert answer["difference"] <= 1e-5, (place, answer)


def every_export() -> Iterator[tuple[Any, Packing]]:
    for width, group in ((256, 128), (256, -1), (64, 128), (72, -1)):
        for bits, form in ((2, "w2a16"), (2, "w4a16"), (3, "w4a16"), (4, "w4a16")):
            made = random_grid("model.layers.0.mlp.experts.down_proj", (8, 40, width), bits, group, np.float32)
            yield made, Packing(form, None if group == -1 or width < group else group)
            if width == 256:
                yield made, Packing(form, 32)
    for form in ("w2a16", "w4a16"):
        yield random_ternary("model.layers.0.mlp.experts.down_proj", (8, 40, 96)), Packing(form, None)
        yield random_ternary("model.layers.0.mlp.experts.down_proj", (8, 40, 96)), Packing(form, 32)


def test_numbers_and_scales_are_ours() -> None:
    """Unpacked by hand they make the very weights that our own format decodes to, whatever the groups."""
    model = tiny_moe("qwen3_moe")
    for made, way in every_export():
        tensors = export_tensors(model, made, way)
        for expert, expected in enumerate(made.weights()):
            name = f"model.layers.0.mlp.experts.{expert}.down_proj"
            packed, scale, shape = (array_of(tensors[f"{name}.weight_{part}"]) for part in ("packed", "scale", "shape"))
            assert packed.dtype == np.int32 and shape.dtype == np.int64 and shape.tolist() == list(expected.shape)
            assert scale.shape[1] == (1 if way.group is None else made.width // way.group)
            numbers = unpacked(packed, way.bits, shape)
            steps = scale.repeat(made.width // scale.shape[1], 1)
            assert np.array_equal((numbers * steps).astype(np.float32), expected)
            assert not np.array_equal((numbers[:, ::-1] * steps).astype(np.float32), expected)


NAMED = [
    *("deepseek_v3", "hunyuan_v1_moe", "jamba", "minimax", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe"),
    "qwen3_moe",
]


@pytest.mark.parametrize("family", NAMED)
def test_names_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    """And every matrix has the shape that transformers saves it with."""
    model = tiny_moe(family)
    with quiet():
        model.save_pretrained(tmp_path)
    saved = {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()}
    experts = {name: shape for name, shape in saved.items() if ".experts." in name}
    exported: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and name.endswith(("up_proj", "down_proj")):
            made = random_grid(name, tuple(parameter.shape), 4, -1, np.float32)
            tensors = export_tensors(model, made, Packing("w4a16", None))
            imagined = imagined_tensors(model, name, torch.float32, Packing("w4a16", None))
            assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
                n: (t.shape, t.dtype) for n, t in imagined.items()
            }
            exported |= tensors
    shapes = {name: tuple(tensor.tolist()) for name, tensor in exported.items() if name.endswith("_shape")}
    assert {name.removesuffix("_shape"): shape for name, shape in shapes.items()} == experts


REFUSED = {
    *("aria_text", "dbrx", "deepseek_ocr2_text", "diffusion_gemma_text", "doge", "ernie4_5_vl_moe_text", "gemma4_text"),
    *("glm4v_moe_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v4"),
    *("inkling2_text", "inkling_text", "jetmoe", "llama4_text", "minimax_m3_vl_text", "mistral4", "muse_spark_text"),
    *("nllb-moe", "openai_privacy_filter", "qwen3_omni_moe_talker_text", "qwen3_vl_moe_text", "step3p5"),
    *("switch_transformers", "zaya"),
}
"""Their checkpoints hold the experts of a layer as one tensor, or Switch's and NLLB's under names of another kind."""


def test_families_without_names_for_experts_are_refused() -> None:
    refused, seen = set(), set()
    for family in experts_classes():
        for model_type in model_types(family) if family != "vitpose_backbone" else ():
            seen.add(model_type)
            model = tiny_moe(model_type)
            names = [name for name, parameter in model.named_parameters() if "experts" in name and parameter.ndim > 1]
            own = [name for name in names if "shared" not in name and "identity" not in name]
            try:
                assert own or model_type == "doge"
                for name in own:
                    imagined_tensors(model, name, torch.float32, Packing("w4a16", None))
            except InputError as error:
                assert "no names for single experts" in error.what
                refused.add(model_type)
            if not own:
                refused.add(model_type)
    assert refused == REFUSED & seen


def test_one_scheme_for_all() -> None:
    """What kernels take, and can be had from all rows without a loss."""
    name = "model.layers.0.mlp.experts.down_proj"

    def way(form: str, *layouts: tuple[int, int]) -> Packing:
        grids = [random_grid(name, (2, 4, width), 2, group, np.float32) for width, group in layouts]
        return packing(form, [made.tensors()[f"{name}.about"] for made in grids])

    assert way("w2a16", (128, 128), (256, 128)) == Packing("w2a16", 128)
    assert way("w2a16", (128, -1), (320, -1)) == Packing("w2a16", None)
    assert way("w2a16", (128, -1), (320, 64)) == Packing("w2a16", 64)
    assert way("w4a16", (192, 128), (256, 128)) == Packing("w4a16", 64)
    with pytest.raises(InputError, match="72 by 72, 256 by 128"):
        way("w4a16", (72, -1), (256, 128))
    with pytest.raises(UsageError, match="w3a16"):
        way("w3a16", (128, 128))
    model, stacks = tiny_moe("qwen3_moe", hidden_size=128), ["model.layers.0.mlp.experts.gate_up_proj", name]
    for group in (-1, 32, 128):
        shapes = [(model.get_parameter(each).shape[-1], group) for each in stacks]
        assert foreseen("w4a16", model, stacks, group) == way("w4a16", *shapes)
    with pytest.raises(InputError, match="no names for single experts"):
        foreseen("w4a16", tiny_moe("gpt_oss"), ["model.layers.0.mlp.experts.down_proj"], -1)
    damaged = np.zeros(3, np.int32)
    assert packing("w2a16", [damaged]) == Packing("w2a16", None), "that it is damaged is said where it is decoded"
    assert packing("w2a16", [random_ternary(name, (2, 4, 96)).tensors()[f"{name}.about"]]) == Packing("w2a16", None)


def test_what_would_lose_something_is_refused() -> None:
    model, name, way = tiny_moe("qwen3_moe"), "model.layers.0.mlp.experts.down_proj", Packing("w2a16", None)
    with pytest.raises(InputError, match="other levels below zero") as caught:
        export_tensors(model, random_ternary(name, (8, 64, 32), (-1, 1.01)), way)
    assert "--symmetric" in caught.value.fix
    numbers, scales = np.ones((8, 64, 32), np.uint8), np.ones((8, 64, 1), np.float32)
    for point, fits in ((2, True), (1, False)):
        points = np.full(scales.shape, point, np.uint8)
        made = grid.pack(numbers, scales, points, 2, 32, name)
        if fits:
            assert export_tensors(model, made, way)
        else:
            with pytest.raises(InputError, match="other levels below zero"):
                export_tensors(model, made, way)
    with pytest.raises(InputError, match="has 3 bits, and the format 2"):
        export_tensors(model, random_grid(name, (8, 64, 32), 3, -1, np.float32), way)
    with pytest.raises(InputError, match="no names for single experts"):
        export_tensors(model, grid.pack(numbers, scales, None, 2, 32, name, transposed=True), way)


def test_a_row_of_one_sign_needs_one_level() -> None:
    """Rows without a - (or a +) have a level that is never used; it may be anything."""
    model, name = tiny_moe("qwen3_moe"), "model.layers.0.mlp.experts.down_proj"
    trits = np.random.default_rng(0).integers(-1, 2, (8, 3, 32)).astype(np.int8)
    trits[:, 0], trits[:, 1], trits[:, 2] = abs(trits[:, 0]), -abs(trits[:, 1]), 0
    levels = np.broadcast_to(np.array([[-9, 1], [-2, 7], [0, 0]], np.float32), (8, 3, 2)).copy()
    made = blob.pack(trits, levels, name)
    tensors = export_tensors(model, made, Packing("w2a16", None))
    for expert, expected in enumerate(made.weights()):
        part = f"model.layers.0.mlp.experts.{expert}.down_proj.weight_"
        numbers = unpacked(array_of(tensors[f"{part}packed"]), 2, array_of(tensors[f"{part}shape"]))
        scale = array_of(tensors[f"{part}scale"])
        assert np.array_equal(numbers * scale, expected)
        assert scale[2] == 1  # not the -0 of a level that there is not, which would make every zero one


def test_the_config_is_one_of_compressed_tensors() -> None:
    """It reads it, and of the names in a model it means those of experts and no others."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    for way in (Packing("w4a16", 128), Packing("w2a16", None)):
        config = QuantizationConfig.model_validate(way.config())
        scheme = config.config_groups["group_0"]
        assert (scheme.weights.num_bits, scheme.weights.group_size) == (way.bits, way.group)
        meant = {
            "model.layers.0.mlp.experts.3.gate_proj": True,
            "model.layers.0.block_sparse_moe.experts.11.w2": True,
            "model.layers.0.mlp.shared_experts.up_proj": False,
            "model.layers.0.mlp.shared_expert.up_proj": False,
            "model.layers.0.mlp.gate": False,
            "model.layers.0.self_attn.q_proj": False,
            "lm_head": False,
        }
        linear = torch.nn.Linear(2, 2)
        assert {name: is_match(name, linear, scheme.targets, config.ignore) for name in meant} == meant
