"""Models and texts that cannot be used, or only in part: what is said of them, and that nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qmoe_runs import (
    LAYERS,
    SMALL,
    compress,
    made_moe,
    names,
    program,
    strict,
    texts,
    words,
)
from safetensors.torch import load_file, save_file
from trees import tree
from typer.testing import CliRunner

import moectl.integrations.transformers as ours
from moectl.cli.main import app
from moectl.compress.quantise.method import method
from moectl.errors import InputError
from moectl.families.tiny import tiny_model
from moectl.layerwise.quiet import quiet


def changed(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model's weights changed on disk; the file."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return path


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_said(place: Path, room: Path) -> None:
    made_moe(room / "moe")

    def unreachable(tensors: dict[str, torch.Tensor]) -> None:
        """The last expert's score is the mean of two others', each of which there is twice."""
        for layer in range(LAYERS):
            gate = tensors[f"model.layers.{layer}.mlp.gate.weight"]
            gate[1], gate[3] = gate[0], gate[2]
            gate[7] = (gate[0] + gate[2]) / 2

    changed(room / "moe", unreachable)
    done = compress(room / "moe", room / "q", *SMALL, "--json", data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    layers = strict(done.stdout)["layers"]
    assert [layer["experts"][7]["tokens"] for layer in layers] == [0] * LAYERS
    assert all(layer["experts"][7]["cold"] for layer in layers)
    said = " ".join(done.stderr.split())
    assert re.search(r"! \d+ of 24 experts, in 3 layers, were given too few tokens and rounded to nearest", said)
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    weight_RN = load_file(room / "moe" / "model.safetensors")[name.format(7)].float()
    quantiser = method(None, dtype=torch.bfloat16)
    nearest_GRN = quantiser.dense(quantiser.quantise(weight_RN[None], None, None))
    arguments = ["decompress", str(room / "q"), "-o", str(room / "plain")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    plain = load_file(room / "plain" / "model.safetensors")
    assert torch.equal(plain[name.format(7)].float(), nearest_GRN[0])
    ours.load(room / "q")


@pytest.mark.parametrize(
    ("tensor", "value", "dense"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", "nan", "int8"),
        ("model.layers.1.mlp.experts.7.up_proj.weight", "inf", "bf16"),
        ("model.layers.1.self_attn.q_proj.weight", "nan", "int8"),
        ("model.layers.1.self_attn.o_proj.weight", "-inf", "bf16"),
        ("model.layers.0.input_layernorm.weight", "nan", "int8"),
        ("model.layers.2.mlp.gate.weight", "nan", "bf16"),
        ("model.embed_tokens.weight", "nan", "int8"),
        ("model.norm.weight", "inf", "bf16"),
        ("lm_head.weight", "nan", "int8"),
    ],
)
def test_weights_that_are_not_finite_are_named(tensor: str, value: str, dense: str, place: Path, room: Path) -> None:
    made_moe(room / "moe")
    path = changed(room / "moe", lambda tensors: tensors[tensor].view(-1)[5:6].fill_(float(value)))
    done = compress(room / "moe", room / "q", *SMALL, "--dense", dense, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError), done.exception
    assert done.exception.what == f"{path}: tensor {tensor!r} holds NaN or infinity."
    assert "q" not in names(room)


@pytest.mark.parametrize(
    ("factor", "says"), [(1e5, "parameter 'model.layers.1.post_attention"), (3e4, "what layer 1 computes")]
)
def test_an_overflow_is_named_with_a_type_that_is_wide_enough(
    factor: float, says: str, place: Path, room: Path
) -> None:
    made_moe(room / "moe")
    changed(room / "moe", lambda tensors: tensors["model.layers.1.post_attention_layernorm.weight"].mul_(factor))
    given = (room / "moe", room / "q", *SMALL)
    done = compress(*given, "--dtype", "float16", data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and says in done.exception.what
    assert "is not finite in float16" in done.exception.what and done.exception.fix == "Give --dtype float32."
    assert compress(*given, "--dtype", "float32", data=place / "counting.jsonl").exit_code == 0


def test_an_overflow_of_float32_gives_no_advice_that_was_followed(place: Path, room: Path) -> None:
    made_moe(room / "moe")
    changed(room / "moe", lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].mul_(1e38))
    done = compress(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and "float32" not in done.exception.fix


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def ids_beyond_it(model: Path) -> None:
    made_moe(model, vocab_size=128)


def dense_model(model: Path) -> None:
    with quiet():
        tiny_model("llama", vocab_size=258).save_pretrained(model)


def dense_encoder_decoder(model: Path) -> None:
    with quiet():
        tiny_model("t5", vocab_size=258).save_pretrained(model)


def fp8(model: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    changed(model, quantise)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))


def without_an_expert(model: Path) -> None:
    changed(model, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_tokenizer, "has no tokenizer"),
        (ids_beyond_it, "its vocabulary has 128"),
        (dense_model, "has no routed experts"),
        (dense_encoder_decoder, "has no routed experts"),
        (fp8, "quantised"),
        (without_an_expert, "experts.3.up_proj"),
    ],
)
def test_models_that_cannot_be_used_are_refused(
    change: Callable[[Path], None], says: str, place: Path, room: Path
) -> None:
    made_moe(room / "moe")
    change(room / "moe")
    before = tree(room)
    done = compress(room / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and says in done.exception.what, done.exception
    assert tree(room) == before


def test_what_is_coded_already_is_not_coded_again(place: Path, room: Path) -> None:
    done = compress(place / "clean" / "q", room / "q", *SMALL, data=place / "counting.jsonl")
    assert isinstance(done.exception, InputError) and "moectl decompress" in done.exception.fix
    assert names(room) == []


@pytest.mark.parametrize("documents", [[], ["", ""], ["a few words"]])
def test_too_little_text_is_refused(documents: list[str], place: Path, room: Path) -> None:
    done = compress(place / "moe", room / "q", *SMALL, data=texts(room / "few.jsonl", documents))
    assert isinstance(done.exception, InputError) and done.exception.fix
    assert names(room) == ["few.jsonl"]


HOSTILE = "no\x1b[31m[bold]\nwhere"


def test_hostile_names_are_shown_escaped(place: Path, room: Path) -> None:
    made_moe(room / HOSTILE)
    given = (room / HOSTILE, room / f"q{HOSTILE}", *SMALL)
    done = compress(*given, "--html", room / "page.html", data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{room / f'q{HOSTILE}'}\n"
    for text in (done.stderr, (room / "page.html").read_text(), (room / f"q{HOSTILE}" / "README.md").read_text()):
        assert "\x1b" not in text and "no\\x1b[31m" in text
    changed(room / HOSTILE, lambda tensors: tensors.update({f"evil{HOSTILE}": torch.ones(2)}))
    refused = program(words(*given, "--overwrite", data=place / "counting.jsonl"))
    assert refused.code == 3 and "\x1b" not in refused.stderr and "evilno\\" in refused.stderr
