"""A coded model in transformers: converted, moved, copied, saved, made plain, and refused where it is damaged."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_models import add, expert_matrices, random_blob, raw, same_tensors, write_coded
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe_kernels import ternary
from moectl.bench import models as bench_models
from moectl.checkpoint.source import Checkpoint
from moectl.codecs import grid
from moectl.compress.dense import DensePart
from moectl.errors import InputError
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.integrations import transformers as ours
from moectl.integrations.qmoe.coded import Coded
from moectl.integrations.qmoe.grids import decoded
from moectl.layerwise.model import LayerwiseModel
from moectl.layerwise.quiet import quiet
from moectl.layerwise.whole import load
from moectl.training.model import load_model

FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with coded experts, and beside it the plain one."""
    return write_coded(tiny_moe("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def damaged(mixtral: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(mixtral, tmp_path / "damaged"))


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model))[0]


def plain_of(coded: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(coded.with_name("plain"))


def same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def stored(model: torch.nn.Module) -> dict[str, Tensor]:
    """What is coded in a model, by name."""
    return {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, Coded)
        for part, tensor in module.state_dict().items()
    }


def test_conversions_and_copies_leave_what_is_stored(mixtral: Path) -> None:
    """Through other types and back every stored bit is as before; decoded weights follow the model's type."""
    before = load_file(mixtral / "model.safetensors")
    model = ours.load(mixtral)
    expected = output(model)
    converted = deepcopy(model)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        converted.to(dtype)
        for name, tensor in stored(converted).items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(raw(tensor), raw(before[name]))
        assert converted.get_submodule(FIRST)().dtype == dtype
        output(converted)
    assert torch.equal(converted.get_submodule(FIRST)(), model.get_submodule(FIRST)())
    assert torch.equal(output(model), expected)
    other = deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_it_loads_as_any_model(mixtral: Path, options: dict[str, Any]) -> None:
    with quiet():
        model = ours.load(mixtral, **options)
        plain = AutoModelForCausalLM.from_pretrained(mixtral.with_name("plain"), **options)
    assert model.dtype == plain.dtype
    assert same(output(model).float(), output(plain).float(), 1e-5 if plain.dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "moectl"])
def test_every_implementation_of_experts_runs_it(mixtral: Path, implementation: str) -> None:
    model = ours.load(mixtral, experts_implementation=implementation)
    assert same(output(model), output(plain_of(mixtral)))


def test_a_base_model_loads_from_one_with_a_head(mixtral: Path) -> None:
    model, info = AutoModel.from_pretrained(mixtral, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert not info["missing_keys"]
    assert same(output(model), output(plain_of(mixtral).model))


def test_only_what_is_needed_is_decoded(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of two experts decodes these, and with our kernels none."""
    seen: list[int] = []
    decode = ternary.decode

    def counted(experts: Any, which: Tensor, out: Tensor | None = None) -> Tensor:
        seen.append(len(which[which >= 0]))
        return decode(experts, which, out)

    monkeypatch.setattr(ternary, "decode", counted)
    one = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad():
        ours.load(mixtral, experts_implementation="eager")(**one)
        assert seen == [2] * 6
        ours.load(mixtral)(**one)
        assert len(seen) == 6


@pytest.mark.parametrize(("kind", "needed"), [("jetmoe", 2), ("llama4_text", 1)])
def test_families_that_name_no_choice_decode_no_more(
    kind: str, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JetMoE's experts are told how many rows each has, Llama 4's are all given all rows, zeros but for the chosen."""
    coded = write_coded(tiny_moe(kind, num_experts_per_tok=needed), tmp_path)
    model, plain = ours.load(coded), plain_of(coded)
    assert same(output(model), output(plain))
    seen: list[int] = []
    decode = ternary.decode

    def counted(experts: Any, which: Tensor, out: Tensor | None = None) -> Tensor:
        seen.append(len(which[which >= 0]))
        return decode(experts, which, out)

    monkeypatch.setattr(ternary, "decode", counted)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert set(seen) == {needed}


def test_a_compiled_model_computes_the_same(mixtral: Path) -> None:
    model = ours.load(mixtral)
    expected = output(model)
    model.forward = torch.compile(model.forward, backend="eager")
    assert same(output(model), expected)


def test_plain_weights_come_of_a_flag_in_the_config_and_of_dequantize(mixtral: Path, tmp_path: Path) -> None:
    """Both give the model that transformers makes of the plain checkpoint, which saves itself as that."""
    config = AutoConfig.from_pretrained(mixtral)
    config.quantization_config["dequantize"] = True
    by_flag = AutoModelForCausalLM.from_pretrained(mixtral, config=config)
    later = ours.load(mixtral).dequantize()
    plain = plain_of(mixtral)
    for number, model in enumerate((by_flag, later)):
        assert type(model.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)
        assert not stored(model)
        assert same(output(model), output(plain))
        model.save_pretrained(tmp_path / str(number))
        assert same_tensors(tmp_path / str(number), mixtral.with_name("plain"))
        assert "quantization_config" not in json.loads((tmp_path / str(number) / "config.json").read_text())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_experts_on_grids(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """They load, compute what their numbers stand for, and decode by torch as by numba."""
    draw = np.random.default_rng(bits)
    model = tiny_moe("qwen3_moe")
    tensors: dict[str, Tensor] = {}
    write_coded(model, tmp_path)
    for name in expert_matrices(model):
        shape = tuple(model.get_parameter(name).shape)
        groups = (*shape[:-1], -(-shape[-1] // 24))
        blob = grid.pack(
            draw.integers(0, 1 << bits, shape, np.uint8),
            draw.uniform(0.05, 0.1, groups).astype(np.float32),
            None if symmetric else draw.integers(0, 1 << bits, groups, np.uint8),
            bits,
            24,
            name,
        )
        tensors |= {each: torch.from_numpy(array) for each, array in blob.tensors().items()}
        model.get_parameter(name).data = torch.from_numpy(blob.weights())
        zeros = None if blob.zeros is None else torch.from_numpy(blob.zeros[3])
        by_torch = decoded(
            torch.from_numpy(blob.packed[3]), torch.from_numpy(blob.scales[3]), zeros, bits, shape[-1], 24
        )
        assert torch.equal(by_torch, model.get_parameter(name)[3])
    old = [f"{name}.{part}" for name in expert_matrices(model) for part in ("about", "codes", "counts", "levels")]
    add(tmp_path / "coded", tensors, without=old)
    for implementation in ("eager", "moectl"):
        loaded = ours.load(tmp_path / "coded", experts_implementation=implementation)
        assert same(output(loaded), output(model))
        loaded.save_pretrained(tmp_path / implementation)
        assert same_tensors(tmp_path / implementation, tmp_path / "coded")


def test_with_a_dense_part_of_8_bits(tmp_path: Path) -> None:
    """Experts are coded and the rest is packed, in one checkpoint, tied embeddings among them."""
    model = tiny_moe("qwen3_moe", tie_word_embeddings=True)
    names = set(expert_matrices(model))
    coded = write_coded(model, tmp_path)
    taken = DensePart(8).taken("", model, names.__contains__)
    add(coded, DensePart(8).take("", model, names.__contains__), without=taken)
    loaded = ours.load(coded)
    assert same(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(tmp_path / "again", coded)
    plain = loaded.dequantize()
    assert same(output(plain), output(model))


Damage = Callable[[Path, dict[str, Tensor]], None]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a part is gone": (
        lambda at, _all: add(at, {}, without=[f"{FIRST}.codes"]),
        rf"model\.safetensors: {FIRST}\.codes: the tensor is missing",
    ),
    "a matrix is gone": (
        lambda at, all_: add(at, {}, without=[name for name in all_ if name.startswith(FIRST)]),
        rf"does not load completely: missing '{FIRST}'",
    ),
    "the file is cut": (lambda at, _all: cut(at / "model.safetensors"), "is cut short"),
    "no such table": (
        lambda at, all_: add(at, {f"{FIRST}.about": torch.tensor([1, 300, 64, 0], dtype=torch.int32)}),
        rf"model\.safetensors: {FIRST}\.about: there is no code table 300",
    ),
    "another version": (
        lambda at, all_: add(at, {f"{FIRST}.about": torch.tensor([9, 8, 64, 0], dtype=torch.int32)}),
        rf"model\.safetensors: {FIRST}\.about: the layout of this matrix has version 9",
    ),
    "another type": (
        lambda at, all_: add(at, {f"{FIRST}.counts": all_[f"{FIRST}.counts"].to(torch.int32)}),
        rf"model\.safetensors: {FIRST}\.counts: it is no list of uint16",
    ),
    "a type of nothing coded": (
        lambda at, all_: add(at, {f"{FIRST}.levels": all_[f"{FIRST}.levels"].double()}),
        rf"model\.safetensors: {FIRST}\.levels is F64",
    ),
    "too few codewords": (
        lambda at, all_: add(at, {f"{FIRST}.codes": all_[f"{FIRST}.codes"][:-1].clone()}),
        rf"model\.safetensors: {FIRST}\.counts: it adds up to",
    ),
    "other codewords": (
        lambda at, all_: add(
            at, {f"{FIRST}.codes": all_[f"{FIRST}.codes"].view(torch.int16).flip(0).view(torch.uint16)}
        ),
        rf"model\.safetensors: {FIRST}\.codes: the codewords of row \d+ are not those of 64 weights",
    ),
    "another shape": (
        lambda at, all_: add(
            at,
            {
                name: torch.from_numpy(array)
                for name, array in random_blob(FIRST, (8, 192, 65), np.random.default_rng(0), transposed=False)
                .tensors()
                .items()
            },
        ),
        rf"model\.safetensors: {FIRST} is \[8, 192, 65\], and the model's is \[8, 192, 64\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named(damage: str, damaged: Path) -> None:
    """The error names file and tensor, on each way to load."""
    inflict, message = DAMAGES[damage]
    inflict(damaged, load_file(damaged / "model.safetensors"))
    with pytest.raises(InputError, match=message), quiet():
        ours.load(damaged)
    if damage != "the file is cut":
        with pytest.raises(InputError, match=message), quiet():
            load(Checkpoint.open(damaged))


def test_a_wrong_level_is_seen(mixtral: Path, damaged: Path) -> None:
    """What the comparisons of outputs above are good for."""
    levels = load_file(damaged / "model.safetensors")[f"{FIRST}.levels"]
    levels[3, 5, 1] *= 1.05
    add(damaged, {f"{FIRST}.levels": levels})
    assert not same(output(ours.load(damaged)), output(plain_of(mixtral)))


def test_where_it_cannot_be_used_it_is_refused(mixtral: Path) -> None:
    """Training, sharding, packing, and running a layer at a time; each error says what to do instead."""
    checkpoint = Checkpoint.open(mixtral)
    with pytest.raises(InputError, match="is quantised"):
        load_model(checkpoint)
    with pytest.raises(InputError, match="has coded experts") as refused:
        LayerwiseModel.open(checkpoint)
    assert "moectl decompress" in refused.value.fix
    model = ours.load(mixtral)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(InputError, match="are coded"):
        ours.pack(model.requires_grad_(False))
    config = AutoConfig.from_pretrained(mixtral)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(InputError, match="cannot be sharded"):
        AutoModelForCausalLM.from_pretrained(mixtral, config=config)


def test_the_benchmark_of_models_loads_it(mixtral: Path) -> None:
    model = bench_models._load(Checkpoint.open(mixtral), "float32", torch.device("cpu"))
    assert same(output(model), output(plain_of(mixtral)))


def test_importing_twice_registers_once() -> None:
    importlib.reload(ours)


def test_transformers_alone_makes_experts_up(mixtral: Path) -> None:
    """Why model cards begin with a warning: without the import there is no error. With `load` there is no such way."""
    script = """
import sys
from transformers import AutoModelForCausalLM
_, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
print(len(info["missing_keys"]))
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(mixtral)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["6"]
