"""`moectl compress prune` as it is used: once and again, in a pipe, with a file of scores, and told wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from pruned_models import loaded, made
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.compress.prune import saliency
from moectl.data import documents
from moectl.data.tokens import byte_tokenizer
from moectl.errors import MoectlError, UsageError
from moectl.evaluation import probe
from moectl.evaluation.heldout import heldout_batches

COUNTING = [f"{start}: " + " ".join(str(start + i) for i in range(60)) for start in range(0, 4000, 31)]
LETTERS = [" ".join(chr(97 + (start * i) % 26) * 3 for i in range(80)) for start in range(1, 120)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE whose tokens are bytes, and data of two domains."""
    directory = tmp_path_factory.mktemp("prune")
    made(directory / "moe", "mixtral", vocab_size=258, bos_token_id=256, eos_token_id=256)
    byte_tokenizer().save_pretrained(directory / "moe")
    for name, texts in (("counting", COUNTING), ("letters", LETTERS)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return directory


def prune(place: Path, *arguments: Any, domain: str = "counting") -> Result:
    data = ["--data", str(place / f"{domain}.jsonl")] if domain else []
    return CliRunner().invoke(app, ["compress", "prune", str(place / "moe"), *data, *map(str, arguments)])


SMALL = ("--samples", 4, "--seq-len", 64, "--no-eval")


def test_the_result_is_a_smaller_checkpoint_and_says_on_what_it_was_chosen(place: Path, tmp_path: Path) -> None:
    done = prune(place, "-o", tmp_path / "out", "--ratio", "0.25", *SMALL)
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out")
    assert "256 tokens of" in done.stderr and "warning" not in done.stderr
    out = Checkpoint.open(tmp_path / "out")
    assert out.config["num_local_experts"] == 6 and out.config["num_experts_per_tok"] == 2
    recipe = json.loads((out.path / "moectl.json").read_text())["recipe"]
    assert recipe["keep"] == 6 and recipe["scores"]["tokens"] == 256 and len(recipe["kept"]["2"]) == 6
    assert "256 tokens of `" in (out.path / "README.md").read_text()
    loaded(out)


def test_a_second_run_takes_the_scores_and_a_second_ratio_needs_no_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.safetensors"
    assert prune(place, "-o", tmp_path / "out", "--keep", 6, *SMALL).exit_code == 0
    assert prune(place, "-o", tmp_path / "six", "--keep", 6, *SMALL, "--scores", scores).exit_code == 0
    monkeypatch.setattr(saliency, "routed_scores", None)  # calling it now would be a bug, exit 1
    again = prune(place, "-o", tmp_path / "out", "--keep", 6, *SMALL)
    assert again.exit_code == 0 and "already complete" in again.stderr
    five = prune(place, "-o", tmp_path / "five", "--keep", 5, "--method", "ean", "--scores", scores, "--no-eval")
    assert five.exit_code == 0 and Checkpoint.open(tmp_path / "five").config["num_local_experts"] == 5
    other = prune(place, "-o", tmp_path / "no", "--keep", 5, "--samples", 5, "--scores", scores, "--no-eval")
    assert isinstance(other.exception, UsageError) and "samples = 4" in other.exception.what
    out, six = (tmp_path / name / "model.safetensors" for name in ("out", "six"))
    assert out.read_bytes() == six.read_bytes()


@pytest.mark.parametrize(("method", "kind"), [("naee", "best_6"), ("aimer", "aimer"), ("frequency", "tokens")])
def test_every_method_prunes(method: str, kind: str, place: Path, tmp_path: Path) -> None:
    done = prune(place, "-o", tmp_path / "out", "--keep", 6, "--method", method, *SMALL)
    assert done.exit_code == 0, done.exception
    (file,) = (tmp_path / "out.statistics").iterdir()
    assert f"layers.2.{kind}" in Checkpoint.of_file(file).tensors


def test_a_dry_run_says_what_would_be_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    done = prune(place, "-o", tmp_path / "out", "--keep", 4, *SMALL, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["schema"] == "moectl.plan/1" and plan["experts"] == 4 and plan["source_experts"] == 8
    prune(place, "-o", tmp_path / "out", "--keep", 4, *SMALL, "--dry-run", "--scores", tmp_path / "scores.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_two_workers_write_what_one_does(place: Path, tmp_path: Path) -> None:
    given = ("--keep", 6, *SMALL, "--shard-size", "100kB")
    assert prune(place, "-o", tmp_path / "one", *given).exit_code == 0
    first = prune(place, "-o", tmp_path / "two", *given, "--worker", "1/2")
    assert first.exit_code == 0 and "still missing" in first.stderr and not (tmp_path / "two").exists()
    assert prune(place, "-o", tmp_path / "two", *given, "--worker", "2/2").exit_code == 0
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 2
    assert all((tmp_path / "two" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)


def test_pruned_models_are_pruned_further_in_a_pipe(place: Path, tmp_path: Path) -> None:
    first = prune(place, "-o", tmp_path / "six", "--keep", 6, *SMALL, "--quiet")
    assert first.stderr == ""
    given = ["--data", str(place / "letters.jsonl"), *map(str, SMALL)]
    arguments = ["compress", "prune", first.stdout.strip(), "-o", str(tmp_path / "four"), "--keep", "4", *given]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert loaded(Checkpoint.open(tmp_path / "four")).config.num_local_experts == 4


def test_loss_and_generation_are_measured_by_domain(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", (str(place / "letters.jsonl"),))
    small_probe(monkeypatch)
    arguments = ("-o", tmp_path / "out", "--keep", 6, "--method", "aimer")
    done = prune(place, *arguments, "--json")
    domains = json.loads(done.stdout)["domains"]
    assert list(domains) == ["counting", "letters"]
    whole, out = (loaded(Checkpoint.open(path)) for path in (place / "moe", tmp_path / "out"))
    for domain, found in domains.items():
        token_BL = torch.from_numpy(heldout(place, domain))
        for model, key in ((whole, "loss_before"), (out, "loss_after")):
            with torch.no_grad():
                assert float(model(input_ids=token_BL, labels=token_BL).loss) == pytest.approx(found[key], rel=1e-4)
        assert f"{domain}: loss {found['loss_before']:.3f} -> {found['loss_after']:.3f}" in done.stderr


def test_a_domain_whose_generation_breaks_is_a_warning_even_when_quiet(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", ())
    small_probe(monkeypatch)
    monkeypatch.setattr(probe, "LEAST_NEW", 2.0)
    done = prune(place, "-o", tmp_path / "out", "--keep", 6, "--method", "aimer", "--quiet")
    assert done.exit_code == 0 and "warning: Generation breaks on counting" in done.stderr


def test_built_in_text_is_a_warning(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", (str(place / "letters.jsonl"),))
    done = prune(place, "-o", tmp_path / "out", "--keep", 6, *SMALL, domain="")
    assert done.exit_code == 0 and "warning: Experts are chosen on built-in text" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--keep", 6, "--ratio", 0.5), 2, "contradict"),
        (("--keep", 1), 2, "cannot be kept"),
        (("--keep", 6, "--data", "nowhere.jsonl"), 3, "does not exist"),
        (("--keep", 6, "--seq-len", 256, "--data", "{place}/short.txt"), 3, "held-out|shorter"),
        (("--keep", 6, "--device", "tpu"), 2, "not known"),
        (("--keep", 6, "--scores", "{place}/moe/model.safetensors"), 3, "no file of scores"),
    ],
)
def test_mistakes_are_told(arguments: tuple[Any, ...], code: int, says: str, place: Path, tmp_path: Path) -> None:
    (place / "short.txt").write_text("a few words")
    given = [str(each).replace("{place}", str(place)) for each in arguments]
    done = prune(place, "-o", tmp_path / "out", *given, "--no-eval", domain="")
    assert isinstance(done.exception, MoectlError) and done.exception.exit_code == code
    assert re.search(says, done.exception.what)
    assert not (tmp_path / "out").exists()


def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 40, "GIVEN": 16, "WRITTEN": 12, "TEXTS": 3}.items():
        monkeypatch.setattr(probe, name, value)


def heldout(place: Path, domain: str) -> Any:
    encode = byte_tokenizer()
    found = heldout_batches(
        [str(place / f"{domain}.jsonl")],
        lambda text: encode(text).input_ids,
        eos_id=256,
        sequence_length=probe.LENGTH,
        batch_size=probe.TEXTS * probe.BATCHES,
        max_batches=1,
    )
    return found[domain][0]
