"""Every MoE family of the installed transformers with coded experts: one fresh process loads them all.

Each computes what the plain model does; decompressed, each has the tensors that the family saves.

Families are found in the installed source, so one that a new release adds is walked without being asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_models import expert_matrices, same_tensors, write_coded
from installed import installed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.compress.decoding import Decoding
from moectl.compress.decompress import plan_decompress
from moectl.compress.qmoe_families import REFUSED
from moectl.errors import InputError
from moectl.families.backend import experts_classes
from moectl.families.tiny_moe import model_types, tiny_inputs, tiny_moe

NO_MATRICES = ("doge", "vitpose_backbone")
KINDS = installed(*(each for name in experts_classes() if name not in NO_MATRICES for each in model_types(name)))
PARTS = set(KINDS) & REFUSED.keys()
"""Parts of larger models, and models that predict no tokens. They load by classes of their own; `compress` and
`decompress` take language models."""

TOLERANCE = 1e-5

LOADING = """
import importlib, json, sys
from pathlib import Path
import torch
import moectl.integrations.transformers
from moectl.families.tiny_moe import tiny_inputs
from moectl.integrations.implementation import set_ours
from moectl.layerwise.quiet import quiet
from safetensors.torch import save_file

place = Path(sys.argv[1])
for line in sys.stdin:
    kind, module, name = line.split()
    with quiet(), torch.no_grad():
        auto = getattr(importlib.import_module(module), name)
        model, info = auto.from_pretrained(place / kind / "coded", output_loading_info=True)
        problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
        inputs = tiny_inputs(model)
        outputs = {"as_loaded": model(**inputs)[0].clone()}
        model.save_pretrained(place / kind / "again")
        set_ours(model)
        outputs["ours"] = model(**inputs)[0].clone()
    save_file(outputs, place / kind / "found.safetensors", {"problems": json.dumps(problems)})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each kind of model: coded, plain, saved again after loading, what each computes."""
    root = tmp_path_factory.mktemp("families")
    classes = []
    for number, kind in enumerate(KINDS):
        model = tiny_moe(kind)
        write_coded(model, root / kind, flip=number % 2 == 1)
        with torch.no_grad():
            save_file({"plain": model(**tiny_inputs(model))[0].clone()}, root / kind / "expected.safetensors")
        classes.append(f"{kind} {type(model).__module__} {type(model).__name__}")
    command = [sys.executable, "-W", "ignore", "-c", LOADING, str(root)]
    subprocess.run(command, input="\n".join(classes), text=True, check=True)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_loads_what_was_coded(kind: str, place: Path, record_property: Any) -> None:
    """No key is missing, unexpected or misfitting; the output is the plain model's; what it saves is what it loaded."""
    found = load_file(place / kind / "found.safetensors")
    plain = load_file(place / kind / "expected.safetensors")["plain"]
    with (place / kind / "found.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert json.loads(header["__metadata__"]["problems"]) == {}
    for output in found.values():
        assert (output - plain).norm() <= TOLERANCE * plain.norm()
    assert same_tensors(place / kind / "coded", place / kind / "again")
    stated = [json.loads((place / kind / each / "config.json").read_text()) for each in ("coded", "again")]
    assert stated[0]["quantization_config"] == stated[1]["quantization_config"]
    record_property("coded families", 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PARTS])
def test_decompressed_it_is_what_the_family_saves(kind: str, place: Path, tmp_path: Path) -> None:
    """Names, shapes and values are those of `save_pretrained` of the plain model."""
    write(plan_decompress(Decoding.of(Checkpoint.open(place / kind / "coded")), "auto", 1 << 30), tmp_path / "dense")
    assert same_tensors(tmp_path / "dense", place / kind / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_parts_of_models_are_refused(place: Path) -> None:
    """They are those that no class of language models takes."""
    known = {
        config.model_type for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) for config in auto._model_mapping
    }
    assert set(KINDS) - known == PARTS
    with pytest.raises(InputError, match="is no language model transformers can build"):
        Decoding.of(Checkpoint.open(place / "glm4v_moe_text" / "coded"))


def test_the_families_without_matrices_have_nothing_to_code() -> None:
    """And of every other family, experts were coded above."""
    assert expert_matrices(tiny_moe("doge")) == []
    assert REFUSED.keys() >= set(NO_MATRICES)
