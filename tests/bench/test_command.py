"""`moectl bench` as scripts use it: what is on stdout, the files, the exit codes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from coded_models import write_coded

from moectl.bench import models, tables
from moectl.cli.main import app
from moectl.errors import CheckFailed, InputError, MachineError, UsageError
from moectl.families.tiny import tiny_model
from moectl.integrations import transformers as ours

QUICK = ["--shape", "32,16,4,2", "--tokens", "1,6", "--time", "0.001", "--device", "cpu", "--quiet"]
PEERS = ["--backend", "moectl,loop,scattermoe"]


def bench(*arguments: object) -> None:
    app(["bench", *map(str, arguments)], standalone_mode=False)


def test_json_through_a_pipe():
    """Without any option that says what: the defaults of a CPU, in a program of its own."""
    program = [sys.executable, "-m", "moectl", "bench", "layer", "--device", "cpu", "--tokens", "1", "--time", "0.001"]
    first = subprocess.Popen([*program, "--backend", "moectl,loop", "--json"], stdout=subprocess.PIPE)
    tool = subprocess.run([sys.executable, "-m", "json.tool"], stdin=first.stdout, capture_output=True, check=True)
    document = json.loads(tool.stdout)
    assert first.wait() == 0 and document["schema"] == "moectl.bench/1"
    assert [row["model"] for row in document["rows"]] == ["512,256,32,4"] * 2
    assert document["command"].endswith("--json") and all(roof["tflops"] > 0 for roof in document["roofs"])


@pytest.mark.usefixtures("roof")
def test_tsv_files_and_the_gate(tmp_path, capsys):
    result, html = tmp_path / "r.json", tmp_path / "r.html"
    bench("layer", *QUICK, *PEERS, "--output", result, "--html", html)
    out, err = capsys.readouterr()
    header, *lines = out.rstrip("\n").split("\n")
    columns = header.split("\t")
    assert len(lines) == 6 and all(len(line.split("\t")) == len(columns) for line in lines) and not err
    rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines]
    reason = "it runs on CUDA only" if find_spec("scattermoe") else "scattermoe is not installed"
    assert [row["reason"] for row in rows if row["backend"] == "scattermoe"] == [reason] * 2
    document = json.loads(result.read_text())
    assert [str(row["tokens"]) for row in document["rows"]] == [row["tokens"] for row in rows]
    assert html.read_text().startswith("<!doctype html>")

    bench("layer", *QUICK, *PEERS, "--baseline", result, "--fail-slower", "100000%")  # slower by any measure passes
    slow = dict(document, rows=[{**row, "p50_ms": row["p50_ms"] and 1e-7} for row in document["rows"]])
    result.write_text(json.dumps(slow))
    capsys.readouterr()
    with pytest.raises(CheckFailed, match="times as long"):
        bench("layer", *QUICK, *PEERS, "--baseline", result, "--fail-slower", "5%")
    assert len(capsys.readouterr().out.splitlines()) == 7  # the table is there all the same
    bench("layer", *QUICK, "--backend", "loop", "--baseline", result)
    assert "moectl 32,16,4,2 float32 fwd T=1 is in the baseline and was not measured" in capsys.readouterr().err


@pytest.mark.usefixtures("roof")
def test_a_wrong_peer_exits_5_after_the_table(plant, capsys):
    from moectl.bench.peers import Layer

    plant("wrong", lambda _weights: Layer(lambda x, _index, _weight: x))
    with pytest.raises(CheckFailed, match="wrong 32,16,4,2"):
        bench("layer", *QUICK, "--backend", "loop,wrong")
    assert len(capsys.readouterr().out.splitlines()) == 5
    bench("layer", *QUICK, "--backend", "loop,wrong", "--no-check")


@pytest.mark.usefixtures("roof")
def test_kernels_and_reports(tmp_path, capsys):
    result, readme = tmp_path / "stages.json", tmp_path / "README.md"
    bench("kernels", *QUICK, "-o", result, "--html", tmp_path / "k.html")
    assert "forward, kept" in (tmp_path / "k.html").read_text()
    capsys.readouterr()
    bench("report", result)
    table = capsys.readouterr().out
    assert table.startswith("| d,f,E,k or model | dtype | tokens | stage |")
    readme.write_text("<!-- bench stages -->\n<!-- /bench stages -->\n")
    with pytest.raises(CheckFailed):
        bench("report", result, "--check", readme)
    bench("report", result, "--write", readme)
    bench("report", result, "--check", readme)
    assert table.strip() in readme.read_text()
    assert_tables_fit(json.loads(result.read_text()))
    with pytest.raises(InputError):
        bench("report", readme)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["layer", "--backend", "nobody"], UsageError),
        (["layer", "--what", "sideways"], UsageError),
        (["layer", "--dtype", "int3"], UsageError),
        (["layer", "--tokens", "0"], UsageError),
        (["layer", "--tokens", "many"], UsageError),
        (["layer", "--routing", "even", "--device", "cpu"], UsageError),
        (["layer", "--clock", "cpu", "--threads", "2", "--device", "cpu"], UsageError),
        (["layer", "--fail-slower", "5%"], UsageError),
        (["layer", "--baseline", "not-there.json"], InputError),
        (["layer", "--graph", "--device", "cpu"], MachineError),
        (["layer", "--tune", "--device", "cpu"], MachineError),
        (["layer", "--export", "vllm", "folder", "--device", "cpu"], MachineError),
        (["layer", "--shape", "1,2"], UsageError),
        (["kernels", "no such model"], InputError),
        (["model", "./not-there"], InputError),
        (["report", "not-there.json"], InputError),
    ],
)
@pytest.mark.usefixtures("roof")
def test_what_cannot_be_done_says_so(arguments, error):
    with pytest.raises(error):
        bench(*arguments)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    small = {"num_hidden_layers": 1, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    tiny_model("qwen3_moe", **small).save_pretrained(folder / "moe")
    tiny_model("llama").save_pretrained(folder / "dense")
    return folder / "moe", folder / "dense"


def test_models_and_backends_side_by_side(checkpoints, tmp_path, capsys):
    arguments = ["--prompt", 8, "--new-tokens", 4, "--rounds", 2, "--device", "cpu", "-q", "--json"]
    page = tmp_path / "m.html"
    bench("model", *checkpoints, "--backend", "eager,grouped_mm,nobody", *arguments, "--html", page)
    document = json.loads(capsys.readouterr().out)
    rows = {(row["model"], row["backend"]): row for row in document["rows"]}
    assert list(rows) == [("moe", "eager"), ("moe", "grouped_mm"), ("moe", "nobody"), ("dense", models.AS_LOADED)]
    assert "nobody" in rows["moe", "nobody"]["reason"] and rows["moe", "nobody"]["p50_ms"] is None
    for key, row in rows.items():
        if key[1] == "nobody":
            continue
        assert row["parameters"] > 1000 and row["reps"] == 2 * 3 and row["reason"] is None
        speeds = ("prefill_tokens_per_s", "decode_tokens_per_s", "generate_tokens_per_s", "ttft_ms", "speedup")
        assert all(row[name] > 0 for name in speeds)
        assert row["decode_tokens_per_s"] == pytest.approx(1000 / row["p50_ms"])
    assert "dense" in page.read_text()
    assert_tables_fit(document)


def test_a_coded_model_beside_the_same_weights(tmp_path, capsys, monkeypatch):
    """Parameters are counted alike, bytes are not, and the coded one runs on the codewords."""
    small = {"num_hidden_layers": 1, "moe_intermediate_size": 256, "hidden_size": 256, "num_experts": 4}
    small["num_experts_per_tok"] = 2
    coded = write_coded(tiny_model("qwen3_moe", **small), tmp_path)
    calls = mock.Mock(wraps=ours.ternary_mlp)
    monkeypatch.setattr(ours, "ternary_mlp", calls)
    arguments = ["--prompt", 4, "--new-tokens", 3, "--rounds", 1, "--device", "cpu", "-q", "--json"]
    bench("model", tmp_path / "plain", coded, *arguments)
    document = json.loads(capsys.readouterr().out)
    plain, packed = document["rows"]
    assert [row["model"] for row in document["rows"]] == ["plain", "coded"]
    assert plain["parameters"] == packed["parameters"]
    assert 2 * packed["weight_bytes"] < 4 * plain["parameters"] <= plain["weight_bytes"]
    assert [row["reason"] for row in document["rows"]] == [None, None]
    assert calls.call_count > 10
    assert_tables_fit(document)


def assert_tables_fit(document):
    """What a terminal would show: as many cells as columns, and every row that has a time."""
    shown = list(tables.short(document))
    assert all(len(row) == len(columns) for _, columns, rows in shown for row in rows)
    assert sum(len(rows) for *_, rows in shown) == sum(bool(row["p50_ms"]) for row in document["rows"])
