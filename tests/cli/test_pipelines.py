"""Commands chained in a shell as their users chain them, with the paths and the accidents users have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trees import dense_llama, tree

from moectl.families.tiny import tiny_model

PROGRAM = str(Path(sys.executable).with_name("moectl"))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_llama(tmp_path / "my [bold] dense & model")


def shell(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script with `moectl` on its PATH and pipefail on."""
    path = f"{Path(PROGRAM).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_upcycle_feeds_inspect_feeds_json_tool(dense: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    script = f"""
        moectl inspect "$(moectl upcycle sparse '{dense.name}' -o 'an [out] put/moe' --quiet)" --json \\
            | {sys.executable} -m json.tool
    """
    done = shell(script, tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["schema"], found["experts"], found["path"]) == ("moectl.inspect/1", 8, "an [out] put/moe")


def test_with_stderr_closed_and_a_short_reader(dense: Path, tmp_path: Path) -> None:
    closed = shell(
        f"moectl upcycle sparse '{dense.name}' -o moe 2>&- | xargs -I{{}} moectl inspect {{}} 2>&-", tmp_path
    )
    assert closed.returncode == 0 and closed.stdout.startswith("component\ttensors")
    head = shell("moectl inspect moe --json | head -1", tmp_path)
    assert head.stdout == "{\n" and head.stderr == "" and head.returncode in (0, 141)


def test_dry_run_is_the_plan_that_is_carried_out(dense: Path, tmp_path: Path) -> None:
    command = f"moectl upcycle sparse '{dense.name}' -o moe --experts 3 --shard-size 20kB --json"
    planned = json.loads(shell(f"{command} --dry-run", tmp_path).stdout)
    assert not (tmp_path / "moe").exists()
    made = json.loads(shell(command, tmp_path).stdout)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")}
    assert {file["name"]: file["bytes"] for file in planned["files"]} == sizes
    assert (planned["fingerprint"], planned["bytes"]) == (made["fingerprint"], made["bytes"])
    assert planned["parameters"] == made["parameters"]


def test_verify_passes_records_and_fails(tmp_path: Path) -> None:
    """Equal models pass and are recorded on the card; other weights fail with 5, the report still on stdout."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    assert shell("moectl upcycle sparse dense -o moe --experts 3 -q", tmp_path).returncode == 0
    good = shell("moectl verify moe --against dense --write-card --json", tmp_path)
    document = json.loads(good.stdout)
    assert good.returncode == 0 and document["ok"] and document["comparison"]["relative"] <= 1e-5
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "Against `dense` in fp32 on 64 random tokens" in card and "Not measured yet" not in card
    assert shell("moectl verify moe", tmp_path).returncode == 0  # the card is not among the hashed files
    bad = shell("moectl verify moe --against other", tmp_path)
    assert bad.returncode == 5 and "is above the tolerance 1e-05" in bad.stderr and "relative\t" in bad.stdout
    assert shell("moectl verify moe --against other --tolerance 100", tmp_path).returncode == 0
    assert shell("moectl verify dense --against moe", tmp_path).returncode == 0  # no moectl.json: logits alone
    assert shell("moectl verify moe --write-card", tmp_path).returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_is_resumed(number: int, code: int, dense: Path, tmp_path: Path) -> None:
    command = [PROGRAM, "upcycle", "sparse", str(dense), "--experts", "48", "--noise", "0.01", "--shard-size", "20kB"]
    subprocess.run([*command, "-o", str(tmp_path / "clean"), "-q"], check=True, capture_output=True)
    child = subprocess.Popen([*command, "-o", str(tmp_path / "moe")], stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "moe.partial" / "journal"
    while len(list(journal.glob("model-*"))) < 2 and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=300)
    assert child.returncode == code and "the same command resumes it" in stderr
    assert not (tmp_path / "moe").exists() and list(journal.glob("model-*"))
    assert subprocess.run([*command, "-o", str(tmp_path / "moe"), "-q"], capture_output=True).returncode == 0
    assert tree(tmp_path / "moe") == tree(tmp_path / "clean")


def test_running_a_finished_command_again_changes_nothing(dense: Path, tmp_path: Path) -> None:
    command = f"moectl upcycle sparse '{dense.name}' -o moe -q"
    first = shell(command, tmp_path)
    before = tree(tmp_path / "moe")
    again = shell(command, tmp_path)
    assert (first.stdout, again.stdout, again.returncode) == ("moe\n", "moe\n", 0)
    assert tree(tmp_path / "moe") == before
    other = shell(command + " --seed 1", tmp_path)
    assert (other.returncode, other.stdout) == (2, "") and "--overwrite" in other.stderr
    assert shell(command + " --seed 1 --overwrite", tmp_path).returncode == 0
    assert tree(tmp_path / "moe") != before


def test_paths_that_are_no_text(dense: Path, tmp_path: Path) -> None:
    """File names are bytes; the path printed is the path made, whatever the locale."""
    out = os.fsencode(tmp_path) + b"/moe\xff"
    done = subprocess.run([PROGRAM, "upcycle", "sparse", str(dense), "-o", out], capture_output=True)
    assert (done.returncode, done.stdout) == (0, out + b"\n") and Path(os.fsdecode(out)).is_dir()
