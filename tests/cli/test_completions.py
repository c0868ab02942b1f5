"""The shipped completions are in step with Typer, and complete at the first Tab in real shells."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMPLETIONS = Path(__file__).parents[2] / "completions"
CONTROL_A = "\x01"
ESCAPES = re.compile(r"\x1b(\[[0-9;?>=]*[a-zA-Z]|\].*?\x07|[()].|[=>78])|\r")


def generate_check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, folder / "generate.py", "--check"], capture_output=True, text=True)


def test_shipped_files_are_in_step():
    assert generate_check(COMPLETIONS).returncode == 0


def test_changed_and_missing_files_are_named(tmp_path):
    folder = shutil.copytree(COMPLETIONS, tmp_path / "completions")
    with (folder / "moectl.bash").open("a") as file:
        file.write("\n")
    (folder / "moectl.fish").unlink()
    check = generate_check(folder)
    assert check.returncode == 1
    assert "moectl.bash, moectl.fish;" in check.stderr


def test_compinit_sees_the_zsh_file():
    assert (COMPLETIONS / "_moectl").read_text().startswith("#compdef moectl\n")


class Terminal:
    """An interactive shell in a pseudo-terminal, typed into as a person would."""

    def __init__(self, argv: list[str], home: Path) -> None:
        self.master, self.terminal = pty.openpty()
        # A session leader without a terminal gets the first one it opens as its own.
        attach = [
            "sh",
            "-c",
            'tty=$1; shift; exec "$@" <"$tty" >"$tty" 2>&1',
            "sh",
            os.ttyname(self.terminal),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(home), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
        self.shell = subprocess.Popen([*attach, *argv], env=environment, cwd=home, start_new_session=True)
        self.seen = ""

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, ESCAPES.sub("", self.seen))):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} within {seconds} s of:\n{self.seen}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return match.group(1)

    def complete(self, typed: str, expected: str) -> str:
        """The command line after one Tab, read back by making it an echo once `expected` shows."""
        self.type(typed + "\t")
        self.wait_for(f"({re.escape(expected)})")
        self.type(CONTROL_A + "echo line:\n")
        return self.wait_for(r"\nline:(.*?)/? *\n")

    def close(self) -> None:
        self.shell.kill()
        self.shell.wait()
        os.close(self.terminal)
        os.close(self.master)


def bash(home: Path) -> Terminal:
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], home)
    terminal.type(f"source {COMPLETIONS}/moectl.bash; echo rea''dy\n")
    return terminal


def zsh(home: Path) -> Terminal:
    terminal = Terminal(["zsh", "-f", "-i"], home)
    terminal.type(f"fpath=({COMPLETIONS} $fpath); autoload -Uz compinit; compinit -u -D; bindkey -e; echo rea''dy\n")
    return terminal


def fish(home: Path) -> Terminal:
    folder = home / ".config" / "fish" / "completions"
    folder.mkdir(parents=True)
    shutil.copy(COMPLETIONS / "moectl.fish", folder)
    terminal = Terminal(["fish", "-i"], home)
    terminal.type("echo rea''dy\n")
    return terminal


@pytest.mark.parametrize("start", [bash, zsh, fish])
def test_every_tab_completes(start, tmp_path):
    if not shutil.which(start.__name__):
        pytest.skip(f"{start.__name__} is not installed: its completions are not tried")
    (tmp_path / "weights-of-mine").mkdir()
    terminal = start(tmp_path)
    try:
        terminal.wait_for("(ready)")
        assert terminal.complete("moectl upc", "ycle") == "moectl upcycle"
        assert terminal.complete("moectl upcycle spa", "rse") == "moectl upcycle sparse"
        assert terminal.complete("moectl verify --aga", "inst") == "moectl verify --against"
        assert terminal.complete("moectl verify weig", "hts-of-mine") == "moectl verify weights-of-mine"
    finally:
        terminal.close()
