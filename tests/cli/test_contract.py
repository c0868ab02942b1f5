"""What scripts depend on: exit codes, what goes to stdout and what to stderr, and how the program ends."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_tree import leaf_commands
from safetensors.numpy import load_file, save_file

from moectl.families.config import normalised
from moectl.families.registry import DENSE
from moectl.families.shapes import expected_tensors
from moectl.report import output

PROGRAM = str(Path(sys.executable).with_name("moectl"))
HOSTILE = "no\x1b[31m[bold]\nwhere"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
PLANTED = """
import os, sys, time
from moectl.cli.main import app, main
from moectl.errors import InputError
from moectl.report import output

@app.command("planted")
def planted() -> None:
    {body}

sys.argv = ["moectl", "planted"]
main()
"""


@pytest.fixture
def dense(tmp_path):
    """A Llama of one layer and width 8."""
    family = DENSE["llama"]
    shapes = dict(expected_tensors(family, normalised(family, CONFIG)))
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Each test works in its own folder, offline, with buffers and colours as a user has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("PYTHONUNBUFFERED", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def run(command, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=300, **options)


def moectl(*arguments, **options):
    return run([PROGRAM, *map(str, arguments)], **options)


def planted(body):
    """A command line of the program with one more command, `planted`, that runs `body`."""
    return [sys.executable, "-c", PLANTED.format(body=body)]


def bash(script):
    return run(["bash", "-c", f'set -o pipefail; moectl() {{ "{PROGRAM}" "$@"; }}; {script}'])


def in_terminal(command, **environment):
    """What a person at a terminal sees of `command`: stdout and stderr as one."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**os.environ, **environment})
    os.close(terminal)
    seen = b""
    while True:
        try:
            seen += os.read(master, 65536)
        except OSError:  # EIO: the other side has closed
            break
    os.close(master)
    assert process.wait() == 0, seen
    return seen.decode()


def assert_short_error(stderr, *named):
    """At most three lines that name what is wrong, and no traceback."""
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3
    assert "Traceback" not in stderr
    assert all(name in stderr for name in named)


# ---- results and exit codes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["upcycle", "no-such-command"],
        ["upcycle", "sparse"],
        ["upcycle", "sparse", "dense", "--out"],
        ["upcycle", "sparse", "dense", "-o", "out", "--experts", "many"],
        ["--no-such-option"],
        *([*command.split(), "--no-such-option"] for command in leaf_commands()),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2_on_stderr(arguments):
    done = moectl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"^Error: ", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", ["upcycle sparse {} -o out", "inspect {}", "verify {}"])
def test_a_missing_model_exits_3(command):
    done = moectl(*command.format("./nowhere").split())
    assert (done.returncode, done.stdout) == (3, "")
    assert_short_error(done.stderr, "./nowhere")


def test_a_hub_model_without_a_network_exits_4():
    done = moectl("upcycle", "sparse", "nobody/nothing", "-o", "out")
    assert (done.returncode, done.stdout) == (4, "")
    assert_short_error(done.stderr, "nobody/nothing")


def test_an_existing_output_exits_2_and_stays(dense, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    done = moectl("upcycle", "sparse", dense, "-o", "out", "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    assert_short_error(done.stderr, "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_nothing_is_written_into_a_source_statistics_neither(dense, tmp_path):
    before = sorted((tmp_path / "dense").iterdir())
    done = moectl("upcycle", "split", dense, "-o", "dense/inside", "--experts", "2", "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    assert_short_error(done.stderr, "inside")
    assert sorted((tmp_path / "dense").iterdir()) == before


def test_making_a_checkpoint_prints_its_path_and_no_more(dense):
    done = moectl("upcycle", "sparse", dense, "-o", "out")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert "moectl verify out" in done.stderr


def test_quiet_leaves_stderr_empty(dense):
    done = moectl("upcycle", "sparse", dense, "-o", "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")


def test_a_changed_weight_exits_5_and_the_report_still_comes(dense, tmp_path):
    moectl("upcycle", "sparse", dense, "-o", "out")
    whole = moectl("verify", "out")
    assert whole.returncode == 0
    weights = tmp_path / "out" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    changed = moectl("verify", "out")
    assert changed.returncode == 5
    assert_short_error(changed.stderr, "out")
    assert len(changed.stdout.splitlines()) == len(whole.stdout.splitlines())


def test_json_is_one_document_with_a_schema(dense):
    for command in (
        "upcycle sparse dense -o out --dry-run",
        "upcycle sparse dense -o out",
        "verify out",
        "inspect out",
        "inspect out --weights",
    ):
        done = moectl(*command.split(), "--json")
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"moectl\.\w+/\d+", strict_json(done.stdout)["schema"])


def test_dry_run_writes_nothing(dense, tmp_path):
    assert moectl("upcycle", "sparse", dense, "-o", "out", "--dry-run").returncode == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["upcycle sparse dense -o out --dry-run", "inspect dense"])
def test_a_report_in_a_pipe_is_tsv(dense, command):
    done = moectl(*command.split())
    assert done.returncode == 0
    header, *rows = done.stdout.splitlines()
    assert rows
    assert {row.count("\t") for row in rows} == {header.count("\t")} != {0}


def test_version_is_a_result():
    done = moectl("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"moectl \d+\.\d+\S*\n", done.stdout)


# ---- streams -----------------------------------------------------------------------------------------------


def test_closed_streams_change_no_exit_code_and_no_byte(dense, tmp_path):
    made = set()
    for number, closed in enumerate(["", "0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"]):
        assert bash(f"moectl upcycle sparse '{dense}' -o {number} {closed}").returncode == 0, closed
        made.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(made) == 1


def test_stderr_closed_keeps_the_exit_code():
    assert bash("moectl upcycle sparse ./nowhere -o out 2>&-").returncode == 3


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_left_ends_it_quietly_with_141(stream):
    arguments = {"stdout": ["--help"], "stderr": ["no-such-command"]}[stream]
    reader, writer = os.pipe()
    os.close(reader)
    done = moectl(*arguments, **{stream: writer})
    os.close(writer)
    assert done.returncode == 141
    assert not done.stdout
    assert not done.stderr


def test_head_ends_a_long_report_quietly_with_141(tmp_path):
    (tmp_path / "long.py").write_text(planted("output.emit_table(['n'], [[n] for n in range(10**5)])")[2])
    done = bash(f"'{sys.executable}' long.py | head -1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "n\n", "")


def test_a_full_disk_under_stdout_exits_4():
    with Path("/dev/full").open("w") as full:
        done = moectl("--help", stdout=full)
    assert done.returncode == 4
    assert_short_error(done.stderr, "No space left on device")


def test_a_dumb_terminal_sees_no_escape(dense):
    seen = in_terminal([PROGRAM, "upcycle", "sparse", str(dense), "-o", "out"], TERM="dumb")
    seen += in_terminal(planted("output.emit_table(['name', 'n'], [['model', 1]], 'title')"), TERM="dumb")
    assert "model" in seen
    assert "\x1b" not in seen


def test_no_color_means_no_colour(dense):
    command = [PROGRAM, "upcycle", "sparse", str(dense), "-o", "out", "--overwrite"]
    colour = re.compile(r"\x1b\[([0-9]+;)*(3|4|9|10)[0-9]")
    assert colour.search(in_terminal(command, TERM="xterm-256color"))
    assert not colour.search(in_terminal(command, TERM="xterm-256color", NO_COLOR="1"))


# ---- ends --------------------------------------------------------------------------------------------------


def test_a_bug_exits_1_with_traceback_and_where_to_report():
    done = run(planted("raise RuntimeError('planted')"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    assert "RuntimeError: planted" in done.stderr
    assert "issue tracker" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_how_to_go_on(number, code):
    process = subprocess.Popen(
        planted("print('ready', flush=True); time.sleep(60)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert "same command resumes" in stderr


# ---- names are data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        f"raise InputError({HOSTILE!r} + ' is wrong.', {HOSTILE!r}, {HOSTILE!r})",
        f"output.note('a note'); raise InputError({HOSTILE!r})",
        f"output.warn({HOSTILE!r}.replace(chr(10), '')); raise InputError('it')",
    ],
)
def test_a_hostile_name_in_an_error_is_escaped(body):
    done = run(planted(body))
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert r"no\x1b[31m[bold]" in done.stderr


def test_a_hostile_path_is_escaped():
    done = moectl("upcycle", "sparse", "./" + HOSTILE, "-o", "out")
    assert done.returncode == 3
    assert_short_error(done.stderr, r"./no\x1b[31m[bold]\nwhere")


def test_a_table_in_a_pipe_has_one_line_per_row(capsys):
    output.emit_table(["name\tof", "n"], [[HOSTILE, 1], ["a\tb\r\x00", None], ["x" * 500, 0.1]])
    lines = capsys.readouterr().out.split("\n")
    assert lines == [
        "name\\tof\tn",
        "no\\x1b[31m[bold]\\nwhere\t1",
        "a\\tb\\r\\x00\t",
        "x" * 500 + "\t0.1",
        "",
    ]


def test_a_table_on_a_terminal_shows_names_as_they_are():
    table = f"output.emit_table(['name', 'n'], [[{HOSTILE!r}, 1]], {HOSTILE!r})"
    assert r"no\x1b[31m[bold]\nwhere  1" in in_terminal(planted(table), TERM="dumb")


def test_nan_weights_are_null_in_json(dense):
    path = dense / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, path, {"format": "pt"})
    done = moectl("inspect", dense, "--weights", "--json")
    assert done.returncode == 0
    strict_json(done.stdout)


def test_json_has_no_nan(capsys):
    bad = [float("nan"), float("inf"), -float("inf")]
    output.emit_json("moectl.test/1", {"here": bad[0], "deep": [{"x": (bad[1], bad[2], 1.5)}], "name": HOSTILE})
    document = strict_json(capsys.readouterr().out)
    assert document == {
        "schema": "moectl.test/1",
        "here": None,
        "deep": [{"x": [None, None, 1.5]}],
        "name": HOSTILE,
    }


def strict_json(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)
