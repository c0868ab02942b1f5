"""`moectl compress qmoe` as it is used: once and again, in a pipe, with other options, and told wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import loaded
from qmoe_runs import (
    COUNTING,
    EXPERTS,
    LAYERS,
    LETTERS,
    SMALL,
    compress,
    made_moe,
    memory,
    names,
    program,
    raw,
    strict,
    texts,
    words,
)
from torch import Tensor
from trees import tree
from typer.testing import CliRunner

import moectl.integrations.transformers as ours
from moectl.checkpoint import hub, provenance
from moectl.checkpoint.source import Checkpoint
from moectl.cli import qmoe as command
from moectl.cli.main import app
from moectl.compress import qmoe_job
from moectl.compress.pipeline import layer as layers
from moectl.compress.pipeline import preflight
from moectl.data import documents
from moectl.errors import MachineError, MoectlError, UsageError
from moectl.evaluation import change
from moectl.integrations.qmoe.dense import PARTS


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A model, and data of two domains."""
    with memory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_SPEED_SECONDS", 0.0)
        made_moe(directory / "moe")
        texts(directory / "counting.jsonl", COUNTING)
        texts(directory / "letters.jsonl", LETTERS)
        yield directory


@pytest.fixture
def room() -> Iterator[Path]:
    """Where outputs go."""
    with memory() as directory:
        yield directory


@pytest.fixture(scope="module")
def coded(place: Path) -> Path:
    """An output that tests leave as it is."""
    done = compress(place / "moe", place / "coded" / "q", *SMALL, data=place / "counting.jsonl")
    assert done.exit_code == 0, done.exception
    return place / "coded" / "q"


def run(place: Path, out: Path, *options: Any, domain: str = "counting") -> Any:
    return compress(place / "moe", out, *SMALL, *options, data=place / f"{domain}.jsonl")


# ---- what is said -------------------------------------------------------------------------------------------


def test_the_path_alone_is_on_stdout_and_nothing_is_beside_it(place: Path, room: Path) -> None:
    given = words(place / "moe", room / "q", *SMALL, data=place / "counting.jsonl")
    done = program(given)
    assert (done.code, done.stdout) == (0, f"{room / 'q'}\n")
    assert "bits per expert weight" in done.stderr and f"Next: moectl generate {room / 'q'}" in done.stderr
    assert names(room) == ["q"]
    assert program([*given, "--overwrite", "--quiet"]).stderr == ""
    assert names(room) == ["q"]


def test_json_is_one_document_that_adds_up(place: Path, room: Path) -> None:
    done = run(place, room / "q", "--json")
    found = strict(done.stdout)
    assert found["schema"] == "moectl.compress/1" and found["path"] == str(room / "q") and found["published"]
    assert len(found["layers"]) == LAYERS
    weights = sorted((room / "q").glob("*.safetensors"))
    assert found["bytes"] == sum(path.stat().st_size for path in weights)
    coded_bytes = sum(ref.nbytes for name, ref in Checkpoint.open(room / "q").tensors.items() if ".experts." in name)
    assert found["expert_bytes"] == coded_bytes == sum(found["stored_bytes"][p] for p in ("codes", "levels", "counts"))
    assert found["bits_per_expert_parameter"] == 8 * coded_bytes / found["expert_parameters"]
    for layer in json.loads((room / "q" / "compression.json").read_text())["layers"][:LAYERS]:
        per_expert = dict(zip(layer["matrices"]["expert"], layer["matrices"]["tokens"], strict=True))
        assert sum(per_expert.values()) == 6 * 32 * 2 and len(per_expert) == EXPERTS


class Page(HTMLParser):
    """What a page would fetch, and whether it ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.headings.append(tag)
        names = ("src", "srcset", "href", "data", "action")
        self.fetched += [value or "" for name, value in attrs if name in names and not (value or "").startswith("#")]


def test_the_page_is_whole_and_fetches_nothing(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", (str(place / "letters.jsonl"),))
    for name, value in {"LENGTH": 32, "HELDOUT_TOKENS": 64, "DRIFT_TOKENS": 64}.items():
        monkeypatch.setattr(change, name, value)
    options = [option for option in SMALL if option != "--no-eval"]
    arguments = words(place / "moe", room / "q", *options, "--html", room / "page.html", "--json")
    done = CliRunner().invoke(app, [*arguments, "--data", str(place / "counting.jsonl")])
    assert done.exit_code == 0, done.exception
    text = (room / "page.html").read_text()
    page = Page(text)
    assert page.fetched == [] and text.rstrip().endswith("</html>") and "h2" in page.headings
    assert Page('<a href="http://x"><img src=y>').fetched == ["http://x", "y"]
    measured = strict(done.stdout)["measured"]
    assert {"counting", "letters"} <= set(measured["domains"])
    for domain in ("counting", "letters"):
        assert f"{measured['domains'][domain]['after']['loss']:.4g}" in text
    assert names(room) == ["page.html", "q"]


@pytest.mark.parametrize("json_too", [False, True])
def test_a_dry_run_says_what_would_be_and_leaves_nothing(json_too: bool, place: Path, room: Path) -> None:
    done = run(place, room / "q", "--dry-run", *["--json"] * json_too)
    assert done.exit_code == 0, done.exception
    assert names(room) == []
    if json_too:
        assert strict(done.stdout)["schema"] == "moectl.compress-estimate/1"
    else:
        assert done.stdout


def test_built_in_text_is_a_warning(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "EVERY_BUILTIN", (str(place / "letters.jsonl"),))
    done = compress(place / "moe", room / "q", *SMALL, "--quiet")
    assert done.exit_code == 0 and "warning: Experts are calibrated on built-in text" in done.stderr


def test_fewer_sequences_than_asked_for_are_a_warning(place: Path, room: Path) -> None:
    texts(room / "few.jsonl", COUNTING[:8])
    done = compress(place / "moe", room / "q", "--samples", 500, "--seq-len", 32, "--no-eval", data=room / "few.jsonl")
    assert done.exit_code == 0 and re.search(r"warning: There was text for \d+ sequences of 500", done.stderr)


# ---- once and again -----------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any work is a bug."""
    monkeypatch.setattr(qmoe_job, "run", None)


def states(out: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}


def test_a_second_run_changes_nothing_and_does_nothing(place: Path, coded: Path, no_work: None) -> None:
    before = states(coded)
    again = run(place, coded)
    assert again.exit_code == 0 and again.stdout == f"{coded}\n" and "already complete" in again.stderr
    assert strict(run(place, coded, "--json").stdout)["already_complete"]
    assert states(coded) == before
    assert names(coded.parent) == [coded.name]


def test_what_is_there_is_read_by_one_process_which_says_so(
    place: Path, coded: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"{coded} exists: checking its tensors." in run(place, coded).stderr
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(provenance, "Hasher", None)
    done = run(place, coded)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_what_a_killed_run_left_is_tidied_up(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this very run go, whenever it was killed; those of a run with other options are only said."""
    assert run(place, room / "q").exit_code == 0
    key = json.loads((room / "q" / "moectl.json").read_text())["recipe"]["key"]
    for left in (f"q.statistics/{key}/layer-00000.safetensors", "q.statistics/lock"):
        (room / left).parent.mkdir(parents=True, exist_ok=True)
        (room / left).write_text("half of it")
    assert "already complete" in run(place, room / "q").stderr
    assert names(room) == ["q"]
    (room / "q.statistics" / "layers-other").mkdir(parents=True)
    done = run(place, room / "q", "--overwrite")
    assert "q.statistics has files of other runs" in done.stderr
    assert names(room) == ["q", "q.statistics"] and names(room / "q.statistics") == ["layers-other"]


@pytest.mark.parametrize(
    "options",
    [("--bits", 4), ("--dense", "int4"), ("--samples", 5), ("--seq-len", 16), ("--gate-weighted",), ("--code", "qmoe")],
    ids=lambda options: options[0],
)
def test_other_options_are_refused_before_any_work(
    options: tuple[Any, ...], place: Path, coded: Path, no_work: None
) -> None:
    before = tree(coded)
    done = run(place, coded, *options)
    assert isinstance(done.exception, UsageError) and "exists" in done.exception.what
    assert tree(coded) == before and names(coded.parent) == [coded.name]


def test_other_data_another_model_and_an_output_that_was_cut_or_altered_are_refused_too(
    place: Path, coded: Path, room: Path, no_work: None
) -> None:
    assert isinstance(run(place, coded, domain="letters").exception, UsageError)
    made_moe(room / "other", num_hidden_layers=2)
    other = compress(room / "other", coded, *SMALL, data=place / "counting.jsonl")
    assert isinstance(other.exception, UsageError)
    shard = coded / "model.safetensors"
    whole = shard.read_bytes()
    try:
        for spoilt in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1])):
            shard.write_bytes(spoilt)
            assert isinstance(run(place, coded).exception, UsageError)
    finally:
        shard.write_bytes(whole)


def test_overwrite_replaces_it(place: Path, room: Path) -> None:
    assert run(place, room / "q", "--bits", 4).exit_code == 0
    assert run(place, room / "q", "--bits", 2, "--overwrite").exit_code == 0
    assert json.loads((room / "q" / "moectl.json").read_text())["recipe"]["bits"] == 2
    assert names(room) == ["q"]


def test_what_exists_and_is_no_output_is_kept(place: Path, room: Path, no_work: None) -> None:
    (room / "q").mkdir()
    (room / "q" / "thesis.txt").write_text("years")
    done = run(place, room / "q")
    assert isinstance(done.exception, UsageError) and tree(room / "q").keys() == {"thesis.txt"}


@pytest.mark.parametrize("where", ["moe", "moe/inside", ".", "link/inside"])
def test_output_and_source_in_one_another_are_refused_before_the_work(
    where: str, place: Path, room: Path, no_work: None
) -> None:
    made_moe(room / "moe")
    (room / "link").symlink_to(room / "moe")
    before = tree(room)
    done = compress(room / "moe", room / where, *SMALL, "--overwrite", data=place / "counting.jsonl")
    assert isinstance(done.exception, UsageError) and "in one another" in done.exception.what
    assert tree(room) == before


def test_an_upload_that_failed_is_made_up_for(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the first run was asked for one; the model is not compressed again."""
    uploaded: list[Path] = []

    def fails(out: Path, to: str) -> str:
        raise MachineError("no network")

    def upload(out: Path, to: str) -> str:
        uploaded.append(out)
        return f"https://hub/{to}"

    monkeypatch.setattr(hub, "upload", fails)
    assert isinstance(run(place, room / "q", "--push-to-hub", "me/small").exception, MachineError)
    monkeypatch.setattr(hub, "upload", upload)
    before = tree(room / "q")
    for _ in range(2):
        done = run(place, room / "q", "--push-to-hub", "me/small", "--json")
        assert strict(done.stdout)["uploaded"] == "https://hub/me/small"
        assert tree(room / "q") == before and names(room) == ["q"]
    assert uploaded == [room / "q"] * 2


def test_measuring_that_failed_is_made_up_for(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the output has its name, which takes nothing from it: the same command measures again."""
    told: Callable[..., Any] = command._told
    monkeypatch.setattr(command, "_told", None)
    assert isinstance(run(place, room / "q").exception, TypeError)
    assert names(room) == ["q", "q.statistics"]
    before = tree(room / "q")
    monkeypatch.setattr(command, "_told", told)
    done = run(place, room / "q", "--html", room / "page.html")
    assert done.exit_code == 0 and "bits per expert weight" in done.stderr
    assert tree(room / "q") == before and names(room) == ["page.html", "q"]


# ---- what comes out -----------------------------------------------------------------------------------------


def copied(source: Checkpoint, out: Checkpoint) -> tuple[set[str], set[str]]:
    """Names of the source's tensors that are in the output byte for byte, and of those that are not."""
    same = {
        name
        for name, ref in source.tensors.items()
        if name in out.tensors and out.tensors[name].dtype == ref.dtype and raw(source, name) == raw(out, name)
    }
    return same, set(source.tensors) - same


def test_what_is_not_coded_is_copied(place: Path, coded: Path, room: Path) -> None:
    source = Checkpoint.open(place / "moe")
    experts = {name for name in source.tensors if ".experts." in name}
    assert run(place, room / "q", "--dense", "bf16").exit_code == 0
    same, others = copied(source, Checkpoint.open(room / "q"))
    assert others == experts
    out = Checkpoint.open(coded)
    same, others = copied(source, out)
    rounded = {name for name in others - experts if f"{name.removesuffix('weight')}{PARTS[0]}" in out.tensors}
    assert others == experts | rounded and "model.layers.1.self_attn.q_proj.weight" in rounded
    assert {"model.norm.weight", "model.layers.1.mlp.gate.weight"} <= same
    with (room / "q" / "model.safetensors").open("r+b") as file:
        ref = Checkpoint.open(room / "q").tensors["model.norm.weight"]
        file.seek(ref.offset)
        file.write(b"\x00")
    assert copied(source, Checkpoint.open(room / "q"))[1] == experts | {"model.norm.weight"}


def test_it_computes_what_the_pipeline_left(place: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's results while compressing, the loaded output's, and those of the output decompressed."""
    left: list[Tensor] = []
    seen: list[Tensor] = []
    write_tree, of = layers.write_tree, qmoe_job.Job.of

    def spy(path: Path, after: Any) -> None:
        if path.parent.name == f"{LAYERS - 1:05d}" and path.name.startswith("left-"):
            left.append(after[0][0] if isinstance(after[0], tuple) else after[0])
        write_tree(path, after)

    def spied(*given: Any) -> Any:
        job = of(*given)
        seen.append(torch.from_numpy(job.tokens))
        return job

    monkeypatch.setattr(layers, "write_tree", spy)
    monkeypatch.setattr(qmoe_job.Job, "of", spied)
    assert run(place, room / "q", "--dense", "int8").exit_code == 0
    model = ours.load(room / "q", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(torch.cat(left)))
        found = model(input_ids=seen[0]).logits
    assert found.shape[0] == 6 and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert CliRunner().invoke(app, ["decompress", str(room / "q"), "-o", str(room / "plain")]).exit_code == 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(Checkpoint.open(room / "plain"))(input_ids=seen[0]).logits, found)
        original = loaded(Checkpoint.open(place / "moe"))(input_ids=seen[0]).logits
    assert (original - found).abs().max() > 0.01


def test_it_composes_with_pruning_in_a_pipe(place: Path, room: Path) -> None:
    """`compress qmoe "$(compress prune M -o P --quiet)" -o Q`"""
    data = ["--data", str(place / "counting.jsonl"), "--samples", "4", "--seq-len", "32", "--no-eval", "--quiet"]
    arguments = ["compress", "prune", str(place / "moe"), "-o", str(room / "p"), "--keep", "3", *data]
    pruned = CliRunner().invoke(app, arguments).stdout.rstrip("\n")
    done = CliRunner().invoke(app, ["compress", "qmoe", pruned, "-o", str(room / "q"), *data])
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{room / 'q'}\n", "")
    assert ours.load(room / "q").config.num_experts == 3


@pytest.mark.parametrize("form", ["w2a16", "w4a16"])
def test_an_export_leaves_nothing_beside_it(form: str, place: Path, room: Path) -> None:
    done = run(place, room / "q", "--export", form)
    assert done.exit_code == 0, done.exception
    assert names(room) == ["q"]
    assert json.loads((room / "q" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", 5), "neither 2, 3 or 4"),
        (("--bits", 0), "neither 2, 3 or 4"),
        (("--bits", "nan"), "neither 2, 3 or 4"),
        (("--dense", "int3"), "not known"),
        (("--code", "zip"), "not known"),
        (("--export", "w3a16"), "not known"),
        (("--export", "w4a16", "--bits", 2), "has 4 bits"),
        (("--qmoe-compat", "--bits", 0.8), "neither --bits"),
        (("--group-size", 64), "is for --bits"),
        (("--bits", 4, "--group-size", 0), "too small"),
        (("--device", "tpu"), "not known"),
        (("--dtype", "int8"), "not known"),
        (("--seq-len", 100000), "positions"),
        (("--shard-size", "many"), "not a size"),
        (("--push-to-hub", "a b/c"), "a b/c"),
        (("--html", "{place}"), "is a directory"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_before_any_work(
    options: tuple[Any, ...], says: str, place: Path, room: Path, no_work: None
) -> None:
    done = run(place, room / "q", *(str(each).replace("{place}", str(place)) for each in options))
    assert isinstance(done.exception, MoectlError) and done.exception.exit_code == 2, done.exception
    assert says in done.exception.what and names(room) == []
