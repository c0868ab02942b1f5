"""`moectl analyze-routing` as it is used: on a model, on its trace, on two, with masks and gates, and by mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moectl.cli.main import app
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.errors import CheckFailed, InputError, UsageError
from moectl.families.tiny import tiny_model
from moectl.families.tiny_moe import tiny_moe
from moectl.routing.spelling import UNFINISHED, pieces
from moectl.routing.whatif.registry import WHAT_IFS
from moectl.traces.store import load

PROGRAM = str(Path(sys.executable).with_name("moectl"))
SIZES = {"vocab_size": 258, "eos_token_id": BYTE_EOS_ID, "bos_token_id": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, the same with other weights, a dense model, and data of two domains."""
    directory = tmp_path_factory.mktemp("routing")
    for name, model in (
        ("moe", tiny_moe("mixtral", **SIZES)),
        ("other", tiny_moe("mixtral", seed=1, **SIZES)),
        ("dense", tiny_model("llama", **SIZES)),
    ):
        model.save_pretrained(directory / name)
        byte_tokenizer().save_pretrained(directory / name)
    for name, words in (("sums", "{0} + {0} = {1}; "), ("words", "naïve words, {0} of them. ")):
        lines = [json.dumps({"text": words.format(at, 2 * at) * 4}) for at in range(14)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


DATA = ("--data", "sums.jsonl", "--data", "words.jsonl", "--max-tokens", "1500")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["analyze-routing", *arguments])


def rows(result: Result) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.output + str(result.exception)
    header, *lines = (line.split("\t") for line in result.stdout.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_a_model_its_page_and_its_trace(place: Path) -> None:
    done = run(
        "moe", *DATA, "--html", "page.html", "--trace", "trace", "--mask", "kept:1", "--mask", "1:0", "--weights"
    )
    table = rows(done)
    assert [row["layer"] for row in table] == ["0", "1", "2"] and table[0]["tokens"] == "1434"
    for word in (
        "Balance:",
        "How sure:",
        "Written: trace",
        "Written: page.html",
        "Again: moectl",
        "kept:1: ",
        "Most alike by their weights: experts ",
    ):
        assert word in done.stderr
    assert all(len(line) <= 80 for line in done.stderr.splitlines() if not line.startswith(("Again", "The trace")))
    page = (place / "page.html").read_text(encoding="utf-8")
    assert "Without some experts" in page and "By their weights" in page
    assert "1 + 1 = 2" in "".join(json.loads(_data(page))["pieces"])
    again = run("trace", "-q")
    assert rows(again) == table and again.stderr == ""
    spelled = run("trace", "--tokenizer", "moe", "--html", "again.html", "-q")
    assert rows(spelled) == table and "Without some" not in (place / "again.html").read_text(encoding="utf-8")


def _data(page: str) -> str:
    """The pieces of the sample, as JSON."""
    text = page.split('id="routing">')[1].split("</script>")[0]
    documents = json.loads(text)["streams"][0]["text"]["documents"]
    return json.dumps({"pieces": [piece for document in documents for piece in document["pieces"]]})


def test_two_models_read_the_same_text() -> None:
    found = json.loads(run("moe", "other", *DATA, "--json", "-q").stdout)
    assert found["schema"] == "moectl.analyze-routing/1"
    assert (found["model"]["name"], found["other"]["name"]) == ("moe", "other")
    different = found["differences"]["decoder"]
    assert 0.5 < different["tokens"] <= 1 and len(different["layers"]) == 3
    same = json.loads(run("moe", "moe", *DATA, "--json", "-q").stdout)
    assert same["differences"]["decoder"]["tokens"] == 0 and same["other"]["name"] == "moe (other)"
    told = run("moe", "other", *DATA)
    assert "Against other, decoder: " in told.stderr
    table = rows(told)
    assert all(0 < float(row["changed"]) <= 1 and 0 < float(row["changed_chance"]) < 1 for row in table)


def test_checkpoints_are_compared_with_the_last() -> None:
    found = json.loads(run("moe", "other", "other", *DATA, "--json", "-q").stdout)
    assert found["other"]["name"] == "other" and found["differences"]["decoder"]["tokens"] > 0.5
    assert found["courses"]["decoder"]["checkpoints"] == ["moe", "other (2)", "other (3)"]
    assert all(share["share_C"][1] == 0 < share["share_C"][0] for share in found["courses"]["decoder"]["fluctuation"])


def test_json_names_masks_and_estimates() -> None:
    found = json.loads(run("moe", *DATA, "--mask", "removed:1", "--json", "-q").stdout)
    (rerun,) = found["masks"]["reruns"]
    low, high = rerun["change_interval"]
    assert rerun["mask"] == "removed:1" and low <= rerun["change"] <= high and found["masks"]["tokens"] == 1434
    assert len(found["masks"]["held"]) == 3 and found["masks"]["held"][0]["share_K"][-1] == pytest.approx(1)


def test_weights_are_compared_as_they_are() -> None:
    """Against the tensors of the model itself, expert by expert."""
    found = json.loads(run("moe", *DATA, "--weights", "--json", "-q").stdout)["weights"]
    model = AutoModelForCausalLM.from_pretrained("moe")
    for layer, told in enumerate(found):
        block = model.model.layers[layer].mlp
        parts = [
            tensor.detach().double().flatten(1) for tensor in (block.experts.gate_up_proj, block.experts.down_proj)
        ]
        unit = torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)
        cosine = (unit @ unit.T).fill_diagonal_(-2)
        one, other = told["closest"]["experts"]
        assert told["layer"] == str(layer) and told["closest"]["cosine"] == pytest.approx(cosine.max().item(), abs=1e-4)
        assert cosine[one, other] == cosine.max()
        rows = torch.nn.functional.normalize(block.gate.weight.detach().double(), dim=1)
        pairs = (rows @ rows.T)[torch.triu(torch.ones(8, 8), 1).bool()]
        assert told["router_cosine_mean"] == pytest.approx(pairs.mean().item(), abs=1e-5)


def test_a_gate_exits_with_5_after_the_report() -> None:
    done = run("moe", *DATA, "-q", "--fail-on", "2.effective<9", "--fail-on", "max_vio>100")
    assert isinstance(done.exception, CheckFailed) and "moe: 2.effective is " in done.exception.what
    assert len(done.stdout.splitlines()) == 4
    assert run("moe", *DATA, "-q", "--fail-on", "max_vio>100").exit_code == 0
    both = run("moe", "other", *DATA, "-q", "--fail-on", "changed_first>0.01")
    assert isinstance(both.exception, CheckFailed) and "difference: 0.changed_first is " in both.exception.what


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere/at/all", *DATA), InputError, "nowhere"),
        (("dense", *DATA), InputError, "no layer whose routing can be seen"),
        (("moe", *DATA, "--fail-on", "speed>1"), UsageError, "is no condition"),
        (("moe", *DATA, "--fail-on", "9.max_vio>1"), UsageError, "names the layer '9'"),
        (("moe", *DATA, "--fail-on", "changed>1"), UsageError, "not known here"),
        (("moe", *DATA, "--mask", "most"), UsageError, "is no mask"),
        (("moe", *DATA, "--mask", "7:0"), UsageError, "names expert 0 of layer 7"),
        (("moe", *DATA, "--mask", "kept:1", "--layerwise"), UsageError, "cannot be run again"),
        (("moe", *DATA, "--trace", "dense"), UsageError, "dense exists"),
        (("moe", *DATA, "--html", "dense"), UsageError, "dense is a directory"),
        (("moe", *DATA, "--num-experts", "8"), UsageError, "are for traces"),
        (("moe", *DATA, "--trace-size", "much"), UsageError, "is not a size"),
        (("sums.jsonl",), InputError, "no routing trace"),
        (("sums.jsonl", "--data", "words.jsonl"), UsageError, "is a trace"),
        (("moe", "--data", "nowhere.jsonl"), InputError, "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value[:1] + value[7:]) if isinstance(value, tuple) else "",
)
def test_mistakes_are_told(arguments: tuple[str, ...], error: type, message: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, error), done.exception
    assert message in str(done.exception)


def test_an_existing_trace_is_refused_before_any_work(place: Path) -> None:
    assert run("moe", *DATA, "-q", "--trace", "kept").exit_code == 0
    before = load(place / "kept")["decoder"].statistics.tokens
    refused = run("moe", *DATA, "--trace", "kept")
    assert isinstance(refused.exception, UsageError) and "Reading" not in refused.stderr
    assert run("moe", *DATA, "-q", "--trace", "kept", "--overwrite", "--max-tokens", "900").exit_code == 0
    assert load(place / "kept")["decoder"].statistics.tokens < before


def test_an_interrupted_page_leaves_none(place: Path) -> None:
    refused = run("moe", *DATA, "-q", "--html", "never.html", "--mask", "7:0")
    assert refused.exit_code != 0 and not (place / "never.html").exists()


def test_at_a_terminal_of_80_columns(place: Path) -> None:
    assert run("moe", *DATA, "-q", "--trace", "shown", "--overwrite").exit_code == 0
    master, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"}
    process = subprocess.Popen([PROGRAM, "analyze-routing", "shown"], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    while True:
        try:
            seen += os.read(master, 65536)
        except OSError:  # EIO: the other side has closed
            break
    os.close(master)
    assert process.wait() == 0, seen
    assert b"\x1b[3" not in seen, "no colours"
    lines = re.sub(r"\x1b\[\d*m", "", seen.decode()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.startswith("layer") and line.rstrip().endswith("flags") for line in lines)
    assert sum("|" in line and "/8" in line for line in lines) == 3


def test_a_reader_that_leaves_ends_it_quietly(place: Path) -> None:
    shutil.rmtree(place / "piped", ignore_errors=True)
    assert run("moe", *DATA, "-q", "--trace", "piped").exit_code == 0
    script = f"'{PROGRAM}' analyze-routing piped -q | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=place, timeout=300)
    assert done.stdout.startswith("stream\tlayer\t") and done.stderr == ""


def test_pieces_put_together_are_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve 水 ok"
    found = pieces(tokenizer, tokenizer(text).input_ids)
    assert "".join(piece for piece in found if piece != UNFINISHED) == text
    assert found.count(UNFINISHED) == 3, "one byte before the last of ï, two of 水"


@pytest.fixture(scope="module")
def traced(place: Path) -> Path:
    """The trace of a model of three layers, eight experts."""
    path = place / "asked"
    done = CliRunner().invoke(
        app, ["analyze-routing", str(place / "moe"), "--trace", str(path), "--data", str(place / "sums.jsonl"), "-q"]
    )
    assert done.exit_code == 0, done.output
    return path


def test_other_routers_on_a_trace(traced: Path) -> None:
    found = rows(run(str(traced), "--replay", "mixtral,switch:cf=1.25,deepseek-v3:groups=2,top=1", "-q"))
    assert [row["router"] for row in found] == [
        "the model",
        "mixtral",
        "switch:cf=1.25",
        "deepseek-v3:groups=2,top=1",
    ]
    assert float(found[1]["overlap"]) > 0.99 > float(found[3]["overlap"])


def test_every_what_if_in_a_table_a_page_and_json(traced: Path) -> None:
    names = [each.name for each in WHAT_IFS]
    done = run(str(traced), "--what-if", "all", "--gpus", "4", "--html", "asked.html", "--json", "-q")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    found = document["what_if"]["decoder"]
    assert [each["name"] for each in found] == names
    assert all(each["headline"] and each["rows"] and each["assumptions"] for each in found)
    blocks = run(str(traced), "--what-if", "coalescing,cache:expert_mb=1", "-q").stdout.split("\n\n")
    assert [block.split("\t")[0] for block in blocks] == ["# coalescing\nlayer", "# cache\npolicy"]
    assert all(each["headline"].split()[0] in Path("asked.html").read_text() for each in found)


def test_nodes_alone_are_enough_for_every_what_if(traced: Path) -> None:
    document = json.loads(run(str(traced), "--what-if", "all", "--nodes", "2", "--json", "-q").stdout)
    limit = next(each for each in document["what_if"]["decoder"] if each["name"] == "node-limit")
    assert limit["headline"].startswith("A limit of 1 of 2 nodes")


def test_advice_and_a_placement_that_an_engine_reads(traced: Path) -> None:
    done = run(
        str(traced), "--advise", "--gpus", "4", "--gpu-memory", "24", "--link", "400Gb/s", "--placement", "where.json"
    )
    assert done.exit_code == 0, done.output
    assert "--init-expert-location where.json" in done.stderr and "# advice\ntopic\tadvice\trests on" in done.stdout
    slots = json.loads(Path("where.json").read_text())["physical_to_logical_map"]
    assert all(sorted(set(row)) == list(range(8)) for row in slots)
    again = run(str(traced), "--placement", "where.json")
    assert isinstance(again.exception, UsageError) and "exists" in str(again.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--replay", "nobody"),
        ("--replay", "switch:cf"),
        ("--what-if", "nothing"),
        ("--what-if", "cache:colour=red"),
        ("--what-if", "cache:expert_mb=many"),
        ("--advise", "--link", "fast"),
        ("--what-if", "all:gpus=4"),
        ("--what-if", "cache:gb_per_s=nan"),
        ("--advise", "--gpus", "3", "--nodes", "2"),
        ("--advise", "--gpu-memory", "nan"),
        ("--placement", "nowhere/where.json"),
        ("--placement", "new.json", "--engine", "nobody"),
        ("--placement", "where.txt"),
    ],
)
def test_questions_that_make_no_sense(traced: Path, arguments: tuple[str, ...]) -> None:
    done = run(str(traced), *arguments)
    assert isinstance(done.exception, UsageError), done.output


def test_the_help_names_every_what_if() -> None:
    told = re.sub(r"\s+", "", run("--help").stdout)
    assert all(each.name in told for each in WHAT_IFS)
