"""The dense part in 8 or 4 bits: what is stored is what the model computes with, and routers are left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moectl.integrations.transformers
from moectl.compress import dense as compress_dense
from moectl.compress.dense import DensePart
from moectl.errors import InputError, MachineError, UsageError
from moectl.families.tiny_moe import EXPERTS, tiny_inputs, tiny_moe
from moectl.integrations.qmoe import dense
from moectl.layerwise.quiet import quiet

assert moectl.integrations.transformers  # registers the quantisation method


def unpacked(packed: Tensor, scale: Tensor, width: int, bits: int) -> Tensor:
    """Written from the description of the format, one bit after another; of the scale's type."""
    every = np.unpackbits(packed.numpy().astype("<i4").view(np.uint8), axis=1, bitorder="little")
    numbers = every[:, : width * bits].reshape(len(packed), width, bits) @ (1 << np.arange(bits)) - (1 << bits - 1)
    steps = scale.double().repeat_interleave(width // scale.shape[1], 1)
    return (torch.from_numpy(numbers) * steps).to(scale.dtype)


def bits_of(packed: Tensor, width: int) -> int:
    return 8 if packed.shape[1] == -(-width // 4) else 4


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model))[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_stored_decodes_to_the_weights_that_are_left(bits: int, dtype: torch.dtype | None) -> None:
    model = tiny_moe("qwen2_moe", hidden_size=128)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    part = DensePart(bits, dtype)
    names = part.taken("", model)
    tensors = part.take("", model)
    assert tensors.keys() == {f"{name}{suffix}" for name in names for suffix in ("_packed", "_scale")}
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, before[name])
            continue
        packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
        width = parameter.shape[1]
        outside = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert bits_of(packed, width) == (8 if outside else bits)
        assert scale.dtype == (dtype or torch.float32)
        value = unpacked(packed, scale, width, bits_of(packed, width))
        assert torch.equal(value.float(), parameter)
        assert not torch.equal(unpacked(packed.flip(0), scale, width, bits_of(packed, width)).float(), parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "width", "groups"), [(8, 96, 1), (8, 33, 1), (4, 96, 1), (4, 96, 3), (4, 256, 2)])
def test_decoding_is_that_of_compressed_tensors(bits: int, width: int, groups: int, dtype: torch.dtype) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    draw = torch.Generator().manual_seed(0)
    words = -(-width * bits // 32)
    packed = torch.randint(-(1 << 31), 1 << 31, (40, words), dtype=torch.int32, generator=draw)
    scale = torch.rand((40, groups), generator=draw).to(dtype)
    meaning = compress_dense._meaning(bits, None if groups == 1 else width // groups)
    stored = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([40, width])}
    theirs = PackedQuantizationCompressor.decompress(stored, QuantizationScheme(targets=[], weights=meaning))["weight"]
    ours = dense.decode(packed, scale, width)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    """And the largest weight of a row decides on the step."""
    linear = nn.Linear(160, 64)
    before = linear.weight.detach().clone()
    scale = DensePart(8).take("model.layers.0.q_proj", linear)["model.layers.0.q_proj.weight_scale"]
    assert ((linear.weight - before).abs() <= scale * 0.5001).all()
    torch.testing.assert_close(scale[:, 0], before.abs().amax(1) / 127.5)


def test_four_bit_scales_are_better_than_the_largest_weights() -> None:
    """On Gaussian weights by more than a tenth; by group, none is worse."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 128)
    nn.init.normal_(linear.weight)
    before = linear.weight.detach().clone().unflatten(1, (-1, 128))
    scale = DensePart(4).take("model.layers.0.q_proj", linear)["model.layers.0.q_proj.weight_scale"]
    assert scale.shape == (128, 8)
    step = before.abs().amax(-1, keepdim=True) / 7.5
    nearest = ((before / step).round().clamp(-8, 7) * step - before).square().sum(-1)
    found = (linear.weight.unflatten(1, (-1, 128)) - before).square().sum(-1)
    assert (found <= nearest * 1.0001).all()
    assert found.sum() < 0.9 * nearest.sum()


@pytest.mark.parametrize(("width", "bits", "groups"), [(32, 4, 1), (192, 4, 3), (96, 4, 3), (384, 4, 3), (33, 8, 1)])
def test_groups_fit_the_width(width: int, bits: int, groups: int) -> None:
    """128, or 64 or 32 where it demands it; 8 bits where none fits."""
    linear = nn.Linear(width, 40)
    tensors = DensePart(4).take("layers.3.x", linear)
    packed, scale = (tensors[f"layers.3.x.{part}"] for part in dense.PARTS)
    assert scale.shape == (40, groups) and bits_of(packed, width) == bits
    assert torch.equal(unpacked(packed, scale, width, bits), linear.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_nothing_and_next_to_nothing(bits: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 32, dtype=dtype)
    linear.weight.data[3] = 0
    linear.weight.data[4] = 1e-7
    before = linear.weight.detach().clone()
    tensors = DensePart(bits).take("layers.0.x", linear)
    assert linear.weight.isfinite().all() and all(tensor.isfinite().all() for tensor in tensors.values())
    assert not linear.weight[3].any() and (linear.weight[4] - before[4]).abs().max() <= 1e-7


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_weight_of_float16_stays_finite(bits: int) -> None:
    linear = nn.Linear(64, 32, dtype=torch.float16)
    linear.weight.data[0, 0], linear.weight.data[1, 5] = -65504, 65504
    DensePart(bits).take("layers.0.x", linear)
    assert linear.weight.isfinite().all() and (linear.weight[[0, 1], [0, 5]].abs() > 5e4).all()


def test_eight_bits_take_half_the_bytes() -> None:
    linear = nn.Linear(2048, 256, dtype=torch.bfloat16)
    for bits, share in ((8, 8 + 16 / 2048), (4, 4 + 16 / 128)):
        tensors = DensePart(bits).take("layers.0.x", copy.deepcopy(linear))
        assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == share * linear.weight.numel()


FAMILIES = [
    *("deepseek_v3", "deepseek_v4", "diffusion_gemma_text", "gemma4_text", "gpt_oss", "hunyuan_v1_moe", "jamba"),
    *("longcat_flash", "minimax", "mixtral", "nemotron_h", "nllb-moe", "phimoe", "qwen2_moe", "qwen3_next"),
    *("switch_transformers", "zaya"),
]
"""Scaled and normed embeddings, grouped and latent projections, state spaces, tied heads, routers of all kinds."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same_with_packed_weights(family: str) -> None:
    """Whatever its modules do with their weights; and it never has a router among them."""
    model = tiny_moe(family)
    part = DensePart(8)
    for name in part.taken("", model):
        assert "router" not in name and not name.endswith((".gate.weight", ".wg.weight"))
        assert model.get_parameter(name).shape[0] != EXPERTS
    tensors = part.take("", model, lambda name: ".experts." in name)
    assert tensors and not any(".experts." in name for name in tensors)
    expected = logits(model)
    packed = filled(model, tensors)
    assert {path for path, _ in dense.held(packed)} >= {name.rpartition(".")[0] for name in tensors}
    torch.testing.assert_close(logits(packed), expected, rtol=0, atol=1e-5)
    dense.release(packed)
    assert not list(dense.held(packed))
    assert torch.equal(logits(packed), expected)
    assert {name: p.shape for name, p in packed.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def filled(model: Any, tensors: dict[str, Tensor]) -> Any:
    """The model with its packed weights in modules that hold them."""
    packed = copy.deepcopy(model)
    dense.hold(packed, {name: tensor.to("meta") for name, tensor in tensors.items()})
    ties = {name: other for pair in packed.all_tied_weights_keys.items() for name, other in (pair, pair[::-1])}
    for name, empty in [*packed.named_parameters(remove_duplicate=False)]:
        if empty.is_meta:
            path, _, leaf = name.rpartition(".")
            tensor = tensors[name if name in tensors else ties[name]]
            setattr(packed.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    return packed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_loading_and_saving(bits: int, tied: bool, tmp_path: Path) -> None:
    """All keys find their places, logits are those of the plain rounded model, and saving gives the same bytes."""
    model = tiny_moe("mixtral", tie_word_embeddings=tied)
    tensors = DensePart(bits).take("", model)
    place = tmp_path / "packed"
    write_packed(model, tensors, place, bits)
    loaded = load(place)
    assert loaded.get_input_embeddings().weight_packed.dtype == torch.int32
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    with quiet():
        loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (place, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    again = load(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    again.dequantize()
    assert isinstance(again.lm_head.weight, nn.Parameter)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(logits(again), logits(model))
    with quiet():
        again.tie_weights()
        again.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))

    loaded.tie_weights()
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "weight_" in name)
    scale = loaded.lm_head.weight_scale.clone()
    loaded.to(torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight_scale, scale) and loaded.lm_head.weight.dtype == torch.bfloat16


def test_a_wrong_scale_would_be_seen(tmp_path: Path) -> None:
    """What the tolerances above are worth: one row of one matrix, off by a step."""
    model = tiny_moe("mixtral")
    tensors = DensePart(8).take("", model)
    tensors["model.layers.1.self_attn.q_proj.weight_packed"].view(torch.int8)[3] += 1
    write_packed(model, tensors, tmp_path, 8)
    assert (logits(load(tmp_path)) - logits(model)).abs().max() > 1e-3


def write_packed(model: Any, tensors: dict[str, Tensor], place: Path, bits: int) -> None:
    with quiet():
        model.save_pretrained(place)
    file = place / "model.safetensors"
    names = {name.removesuffix("_packed") for name in tensors}
    save_file({name: each for name, each in load_file(file).items() if name not in names} | tensors, file)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qmoe", "dense": DensePart(bits).config()}
    (place / "config.json").write_text(json.dumps(config))


def load(place: Path) -> Any:
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
    return model.eval()


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot have 5 bits"):
        DensePart(5)
    linear = nn.Linear(64, 64)
    tensors = DensePart(8).take("0", nn.Sequential(linear))
    for wrong in (
        {"0.0.weight_scale": tensors["0.0.weight_scale"][:5]},
        {"0.0.weight_scale": tensors["0.0.weight_scale"].expand(64, 3)},
        {"0.0.weight_scale": tensors["0.0.weight_scale"].double()},
        {"0.0.weight_packed": torch.zeros(64, 5, dtype=torch.int32)},
        {"0.0.weight_packed": tensors["0.0.weight_packed"].float()},
    ):
        with pytest.raises(InputError, match=rf"0\.0\.weight \[64, 64\].*{next(iter(wrong))[4:]} is"):
            dense.hold(nn.ModuleList([nn.Sequential(nn.Linear(64, 64))]), tensors | wrong)
    with pytest.raises(InputError, match=r"0\.0\.weight \[64, 64\]: has no weight_scale"):
        dense.hold(nn.ModuleList([nn.Sequential(linear)]), {"0.0.weight_packed": tensors["0.0.weight_packed"]})
    linear.weight.data[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"layers.0.x.weight has NaN"):
        DensePart(8).take("layers.0.x", linear)
    monkeypatch.setattr(compress_dense, "find_spec", lambda name: None)
    compress_dense._meaning.cache_clear()
    with pytest.raises(MachineError, match="compressed-tensors is not installed"):
        DensePart(8).take("layers.0.x", nn.Linear(64, 64))
