"""Training PEFT adapter directories: what learns, what is written, and that an interruption changes no bit of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import PROGRAM
from tiny_training import ONE
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moectl.checkpoint.provenance import fingerprint_of
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.data.mixture import mixture_rows
from moectl.errors import InputError, UsageError
from moectl.integrations.pesc import PescConfig
from moectl.training.adapters import Adapter, open_source
from moectl.training.metrics import read_metrics
from moectl.training.recipe import TrainRecipe
from moectl.training.run import METRICS, Reporting, train
from moectl.upcycle.pesc import Base, PescRecipe, plan_pesc

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(60).view(2, 30) % 250
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return models.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A dense base model, its PESC adapter as `upcycle pesc` writes it, and LoRA adapters as PEFT does."""
    root = tmp_path_factory.mktemp("models")
    base = models.save_dense(root / "base")
    write(plan_pesc(Base.open(str(base)), PescRecipe(experts=4, adapter_dim=8, lora_rank=2)), root / "pesc")
    for name, model in (("lora", base), ("moe-lora", models.save_moe(root / "moe"))):
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def trained(path: Path, recipe: TrainRecipe, out: Path, **how: Any) -> Path:
    assert train(open_source(str(path)), recipe, out, ONE, **how).step == recipe.steps
    return out


def recipe(data: tuple[str, ...], **changes: Any) -> TrainRecipe:
    return models.recipe(data, **{"only": "adapters", "z_loss": 0.0, **changes})


def equal(one: Path, other: Path) -> bool:
    left, right = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def load(adapter: Path, *, learns: bool = False) -> Any:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=learns)


@pytest.mark.parametrize("kind", ["pesc", "lora", "moe-lora"])
def test_it_is_what_peft_and_adamw_make_of_the_same_batches(
    kind: str, tmp_path: Path, paths: Paths, data: tuple[str, str]
) -> None:
    """PEFT's own model with its own loss, PESC's balancing included, and torch's AdamW: the same steps."""
    path = tmp_path / "adapter"
    path.mkdir()
    for file in paths[kind].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((path / "adapter_config.json").read_text())
    changes = {"lora_dropout": 0.0} | ({"aux_loss_coef": 0.05} if kind == "pesc" else {})
    (path / "adapter_config.json").write_text(json.dumps(settings | changes))
    asked = recipe(data, steps=3, warmup=0, schedule="constant", accumulate=1, aux_loss=0.05 * (kind == "pesc"))
    out = trained(path, asked, tmp_path / "out")
    model = load(path, learns=True).train()
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[-2 if "pesc" in name else -3].split("_")[0] for name in learning} <= {"pesc", "lora"}
    optimizer = torch.optim.AdamW(learning.values(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = mixture_rows(asked.parts, lambda text: list(text.encode()), eos_id=256, sequence_length=32, seed=0)
    losses = []
    for _ in range(3):
        ids = torch.from_numpy(np.stack([row.token_L for row in islice(rows, 4)]))
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    steps = read_metrics(out / "train" / "metrics.jsonl")
    layers = len(steps[0]["load_cv"])
    balance = [0.05 * layers * step["aux"] if kind == "pesc" else 0.0 for step in steps]
    assert [step["loss"] for step in steps] == pytest.approx(
        [loss - aux for loss, aux in zip(losses, balance, strict=True)], rel=1e-5
    )
    assert layers == {"pesc": 2, "lora": 0, "moe-lora": 2}[kind]
    model.save_pretrained(tmp_path / "theirs")
    theirs, before = (load_file(each / WEIGHTS) for each in (tmp_path / "theirs", path))
    for name, tensor in load_file(out / WEIGHTS).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=3e-5, msg=name)
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["pesc", "lora"])
def test_what_is_written_is_a_directory_of_peft(kind: str, tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    """PEFT loads it, has moved logits, and saves the same bits again; the base model's files are as they were."""
    files = {path: path.read_bytes() for path in paths["base"].iterdir()}
    out = trained(paths[kind], recipe(data, steps=4), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {WEIGHTS, "adapter_config.json", "moectl.json", "train"}
    assert (out / "adapter_config.json").read_bytes() == (paths[kind] / "adapter_config.json").read_bytes()
    assert {path: path.read_bytes() for path in paths["base"].iterdir()} == files
    started, ended = (load(path)(input_ids=TOKENS).logits for path in (paths[kind], out))
    assert (started - ended).abs().max() > 1e-2
    again = load(out)
    again.save_pretrained(tmp_path / "again")
    assert equal(out, tmp_path / "again"), "the same names and bits in PEFT's hands"
    recorded = json.loads((out / "moectl.json").read_text())
    assert [source["name"] for source in recorded["sources"]] == ["base", kind]
    # The adapter that was written is trained on as any other is.
    trained(out, recipe(data, steps=1), tmp_path / "further")
    assert fingerprint_of(tmp_path / "further") != fingerprint_of(out)


def test_the_first_loss_is_that_of_the_dense_model_and_layers_have_loads(
    tmp_path: Path, paths: Paths, data: tuple[str, str]
) -> None:
    first = read_metrics(trained(paths["pesc"], recipe(data, steps=1), tmp_path / "a") / "train" / "metrics.jsonl")[0]
    dense = models.recipe(data, steps=1, z_loss=0.0)
    plain = read_metrics(trained(paths["base"], dense, tmp_path / "b") / "train" / "metrics.jsonl")[0]
    assert first["loss"] == plain["loss"], "W_up and B are zero"
    assert len(first["load_cv"]) == len(first["max_vio"]) == 2 and plain["load_cv"] == [] and first["aux"] > 0.9


def test_the_balancing_loss_spreads_the_adapters_tokens(tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    """Only PESC's routers learn, from a lopsided start."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_bytes((paths["pesc"] / "adapter_config.json").read_bytes())
    tensors = load_file(paths["pesc"] / WEIGHTS)
    for name in tensors:
        if name.endswith("pesc_router"):
            tensors[name][:2] *= 4
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    found = {}
    for weight in (0.0, 10.0):
        options = {"steps": 20, "only": "router", "learning_rate": 0.02, "clip": 1e9, "aux_loss": weight}
        out = trained(path, recipe(data, **options), tmp_path / f"out{weight}")
        for name, tensor in load_file(out / WEIGHTS).items():
            assert torch.equal(tensor, tensors[name]) != name.endswith("pesc_router"), name
        found[weight] = sum(read_metrics(out / "train" / "metrics.jsonl")[-1]["load_cv"])
    assert found[10.0] < 0.7 * found[0.0]


def test_what_only_means_on_an_adapter(tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    before = load_file(paths["pesc"] / WEIGHTS)
    for only, kinds in (("experts", ("pesc_down", "pesc_up")), ("attention+router", ("pesc_router", "self_attn"))):
        out = trained(paths["pesc"], recipe(data, steps=2, warmup=0, only=only), tmp_path / only)
        for name, tensor in load_file(out / WEIGHTS).items():
            assert torch.equal(tensor, before[name]) != any(kind in name for kind in kinds), (only, name)
    out = tmp_path / "none"
    for path, only, why in (
        ("pesc", "all", "frozen"),
        ("base", "adapters", "no adapters"),
        ("moe", "adapters", "no adapters"),
        ("lora", "none", "not known"),
    ):
        with pytest.raises(UsageError, match=why):
            train(open_source(str(paths[path])), recipe(data, only=only), out, ONE)
    with pytest.raises(InputError, match="nothing to train"):
        train(open_source(str(paths["lora"])), recipe(data, only="router"), out, ONE)
    with pytest.raises(UsageError, match="expert-parallel"):
        train(open_source(str(paths["pesc"])), recipe(data), out, ONE, expert_parallel=2)
    with pytest.raises(UsageError, match="selection biases"):
        train(open_source(str(paths["moe-lora"])), recipe(data, bias_update=1e-3), out, ONE)
    assert not out.with_name("none.partial").exists()


def test_adapters_that_cannot_be_trained_are_refused(tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    settings = json.loads((paths["lora"] / "adapter_config.json").read_text())

    def broken(name: str, tensors: bool = True, **changes: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(settings | changes))
        if tensors:
            (path / WEIGHTS).write_bytes((paths["lora"] / WEIGHTS).read_bytes())
        return path

    for path, why in (
        (broken("ia3", peft_type="IA3"), "peft_type"),
        (broken("orphan", base_model_name_or_path=None), "no base model"),
        (broken("pickle", tensors=False), "pickles are not opened"),
        (broken("lost", base_model_name_or_path=str(tmp_path / "nowhere")), "does not exist"),
    ):
        with pytest.raises(InputError) as error:
            open_source(str(path))
        assert why in " ".join(error.value.lines())
    for changes in ({"r": 8}, {"target_modules": ["q_proj"]}, {"target_modules": ["no_such_module"]}):
        path = broken(f"other-{len(list(tmp_path.iterdir()))}", **changes)
        with pytest.raises(InputError, match="does not fit base"):
            train(open_source(str(path)), recipe(data), tmp_path / "out", ONE)


def test_the_base_model_is_the_one_the_adapter_names(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_source(str(paths["lora"]))
    assert isinstance(opened, Adapter) and opened.base.path == paths["base"] and opened.name == "lora"
    assert not isinstance(open_source(str(paths["base"])), Adapter)


# ---- interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pesc", "lora"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    kind: str, tmp_path: Path, paths: Paths, data: tuple[str, str]
) -> None:
    """LoRA with dropout: what is drawn follows from the step. The planted error resumes with another seed's draws."""
    asked = recipe(data, steps=6)
    undisturbed = trained(paths[kind], asked, tmp_path / "undisturbed")

    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    outcome = train(open_source(str(paths[kind])), asked, out, ONE, reporting=Reporting(on_step=stop))
    assert (outcome.step, outcome.signal) == (3, signal.SIGTERM) and not out.exists()
    held = FileSystemReader(tmp_path / "out.partial" / "checkpoints" / "step-00000003").read_metadata()
    names = [name for name in held.state_dict_metadata if name.startswith("model.")]
    assert len(names) == len(load_file(paths[kind] / WEIGHTS)), "a checkpoint does not hold the base model"
    resumed = []
    with pytest.raises(UsageError, match="another command"):
        train(open_source(str(paths[kind])), replace(asked, seed=1), out, ONE)
    trained(paths[kind], asked, out, reporting=Reporting(lambda facts: resumed.append(facts.resumed_from)))
    assert resumed == [3] and equal(out, undisturbed)
    assert not equal(trained(paths[kind], replace(asked, seed=1), tmp_path / "planted"), undisturbed)


def test_sigkill_changes_no_bit(tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    out, sources = tmp_path / "out", [word for spec in data for word in ("--data", spec)]
    words = [PROGRAM, "train", str(paths["pesc"]), "-o", str(out), *sources, "--steps", "40", "--batch-size", "4"]
    words += ["--seq-len", "32", "--lr", "0.003", "--save-every", "5", "--device", "cpu"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out.partial" / METRICS
    while child.poll() is None and not any(line["step"] >= 8 for line in read_metrics(metrics)):
        time.sleep(0.01)
    child.kill()
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL and not out.exists()
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0 and done.stdout == f"{out}\n" and "resumed after step" in done.stderr
    asked = TrainRecipe(
        data=data, steps=40, batch_size=4, sequence_length=32, learning_rate=3e-3, only="adapters", aux_loss=0.01
    )
    assert equal(trained(paths["pesc"], asked, tmp_path / "undisturbed"), out)


def test_types_on_disk_stay(tmp_path: Path, paths: Paths, data: tuple[str, str]) -> None:
    """A bfloat16 adapter learns in float32 and is rounded once."""
    path = tmp_path / "narrow"
    write(plan_pesc(Base.open(str(paths["base"])), PescRecipe(experts=4, adapter_dim=8, dtype="bfloat16")), path)
    seen = load_file(trained(path, recipe(data, steps=2), tmp_path / "out") / WEIGHTS)
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}
    assert PescConfig.from_pretrained(tmp_path / "out").num_experts == 4
