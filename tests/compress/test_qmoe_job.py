"""What is asked for is checked before anything is read that takes long; what an output says of itself adds up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qmoe_runs import COUNTING, SMALL, compress, made_moe, memory, texts

import moectl.integrations.transformers as ours
from moectl.checkpoint.source import Checkpoint
from moectl.compress import qmoe_job
from moectl.compress.calibration import Calibration, calibration_tokens
from moectl.compress.qmoe import coded, plan_qmoe
from moectl.compress.qmoe_job import Job
from moectl.compress.qmoe_recipe import QmoeRecipe
from moectl.data.tokens import byte_tokenizer
from moectl.errors import InputError, MoectlError, UsageError
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with memory() as directory:
        made_moe(directory / "moe")
        texts(directory / "counting.jsonl", COUNTING)
        yield directory


def job(model: Path, text: Path, calibration: dict[str, Any] | None = None, **recipe: Any) -> Job:
    asked = Calibration(**{"data": (str(text),), "samples": 4, "sequence_length": 32} | (calibration or {}))
    return Job.of(Checkpoint.open(model), QmoeRecipe(**recipe).checked(), asked)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"export": "w4a16", "code": "qmoe"}, "--code is for ternary weights"),
        ({"export": "w4a16", "dense": "int4"}, "leaves what is no expert's as it is"),
        ({"bits": 4, "code": "qmoe"}, "--code is for ternary weights"),
        ({"bits": 2.0000001}, "neither 2, 3 or 4"),
        ({"bits": float("inf")}, "neither 2, 3 or 4"),
        ({"bits": -0.5}, "neither 2, 3 or 4"),
        ({"compat": True, "symmetric": True}, "neither --bits nor --symmetric"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_would_mean_nothing_are_refused(recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        QmoeRecipe(**recipe).checked()
    assert says in caught.value.what


@pytest.mark.parametrize("bits", [None, 0.01, 1.0, 1.6, 1.99, 2, 3, 4])
def test_all_that_a_recipe_takes_has_a_quantiser(bits: float | None) -> None:
    recipe = QmoeRecipe(bits=bits).checked()
    assert recipe.method(torch.bfloat16).to_json()["bits"] == bits
    assert recipe.is_ternary == (recipe.method(torch.bfloat16).to_json()["method"] == "ternary")


def test_an_export_is_recorded_as_it_is_made(place: Path) -> None:
    recorded = job(place / "moe", place / "counting.jsonl", export="w4a16").recorded
    assert (recorded["bits"], recorded["symmetric"], recorded["dense"]) == (4, True, "bf16")


@pytest.mark.parametrize(
    ("calibration", "recipe"),
    [({"device": "tpu"}, {}), ({"dtype": "int8"}, {}), ({}, {"export": "w4a16", "group_size": 8})],
    ids=["device", "dtype", "groups"],
)
def test_no_text_is_read_for_a_mistake(
    calibration: dict[str, Any], recipe: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(qmoe_job, "calibration_tokens", read)
    with pytest.raises(MoectlError):
        job(place / "moe", place / "counting.jsonl", calibration, **recipe)


@pytest.mark.parametrize("family", ["dbrx", "gpt_oss", "jetmoe"])
def test_a_family_that_cannot_be_exported_is_refused_before_the_work(family: str, tmp_path: Path) -> None:
    with quiet():
        tiny_moe(family, vocab_size=258).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=f"^Checkpoints of {family} have no names for single experts"):
        job(tmp_path / "moe", texts(tmp_path / "t.jsonl", COUNTING), export="w4a16", group_size=-1)


@pytest.mark.parametrize(("bits", "code"), [(1.5, "tunstall"), (1.9, "qmoe")])
def test_bits_that_rows_are_too_narrow_for_are_refused_by_the_estimate(bits: float, code: str, place: Path) -> None:
    asked = job(place / "moe", place / "counting.jsonl", bits=bits, code=code)
    with pytest.raises(InputError, match=f"rows of 32 weights cannot have {bits} bits") as caught:
        _ = asked.estimate
    assert caught.value.fix == "Ask for 2, 3 or 4 bits."


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_of_float64_is_coded_with_levels_of_float32(bits: float | None, place: Path, tmp_path: Path) -> None:
    with quiet():
        model = tiny_moe("qwen3_moe", bos_token_id=256, eos_token_id=256, vocab_size=258, num_hidden_layers=1)
        model.to(torch.float64).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    options = () if bits is None else ("--bits", bits)
    done = compress(tmp_path / "moe", tmp_path / "q", *SMALL, *options, data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    tensors = Checkpoint.open(tmp_path / "q").tensors
    assert {ref.dtype for name, ref in tensors.items() if name.endswith((".levels", ".scales", "_scale"))} == {"F32"}
    ours.load(tmp_path / "q")


# ---- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "length", "most", "shape"),
    [
        (4, 32, None, (4, 32)),
        (4, 32, 100, (3, 32)),
        (4, None, 20, (1, 20)),
        (None, None, 200, (1, 200)),
        (2, None, 1000, (2, 256)),
    ],
)
def test_no_more_tokens_are_taken_than_were_asked_for(
    samples: int | None, length: int | None, most: int | None, shape: tuple[int, int], place: Path
) -> None:
    asked = Calibration((str(place / "counting.jsonl"),), samples, length, most)
    assert calibration_tokens(Checkpoint.open(place / "moe"), asked).shape == shape


def test_sequences_longer_than_all_tokens_together_are_refused(place: Path) -> None:
    asked = Calibration((str(place / "counting.jsonl"),), 4, 32, 31)
    with pytest.raises(UsageError, match="--max-tokens 31 is less than one sequence of 32"):
        calibration_tokens(Checkpoint.open(place / "moe"), asked)


def test_a_model_that_names_no_positions_has_as_many_as_there_is_text_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare:
        """A configuration of a model whose positions have no end."""

        def get_text_config(self, decoder: bool) -> object:
            return object()

    monkeypatch.setattr("moectl.layerwise.skeleton.read_config", lambda _source: Bare())
    asked = Calibration((str(place / "counting.jsonl"),), 1, 700)
    assert calibration_tokens(Checkpoint.open(place / "moe"), asked).shape == (1, 700)


# ---- what is said of an output ------------------------------------------------------------------------------


def test_tensors_that_are_left_out_are_said_and_count_as_nothing_saved(place: Path, tmp_path: Path) -> None:
    asked = job(place / "moe", place / "counting.jsonl", dense="bf16")
    paths = asked.run(tmp_path / "work", lambda _text: None, lambda _share: None)
    made = coded(asked.source, paths)
    plain, less = (
        plan_qmoe(each, asked.recorded, {}, 1 << 30)
        for each in (made, replace(made, ignored=frozenset({"model.norm.weight"})))
    )
    for fact, size in (("parameters", 32), ("source_parameters", 32), ("source_bytes", 64), ("weight_bytes", 64)):
        assert plain.facts[fact] - less.facts[fact] == size, fact
    assert less.facts["ratio"] == less.facts["source_bytes"] / less.facts["weight_bytes"] > plain.facts["ratio"] > 1
    said = "are left out: 1."
    assert said in less.files["README.md"] and said not in plain.files["README.md"]
