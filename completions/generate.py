"""Write the shell completions shipped beside this script; with --check, say whether they are in step instead.

The scripts ask `moectl` at every Tab, so a new command or flag does not change them; a new Typer may.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = {"bash": "moectl.bash", "zsh": "_moectl", "fish": "moectl.fish"}


def script(shell: str) -> str:
    """The completion script for `shell` as Typer writes it, made fit to be installed as a file."""
    program = Path(sys.executable).with_name("moectl")
    environment = {**os.environ, "_MOECTL_COMPLETE": f"source_{shell}"}
    text = subprocess.run([program], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    text = text.strip() + "\n"  # compinit reads `#compdef` on line 1 only
    return autoloadable(text) if shell == "zsh" else text


def autoloadable(zsh: str) -> str:
    """Make a zsh script work from fpath.

    zsh runs the file itself at the first Tab, so the function bears the file's name and is called at the end.
    """
    tail = 'if [ "$funcstack[1]" = "_moectl" ]; then\n  _moectl\nfi\n'
    return zsh.replace("_moectl_completion", "_moectl") + "\n" + tail


def main() -> int:
    """Write the files, or compare them; 1 when --check finds one out of step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if out of step")
    check = parser.parse_args().check
    stale = []
    for shell, name in FILES.items():
        path, text = HERE / name, script(shell)
        if check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    if stale:
        sys.stderr.write(f"completions out of step: {', '.join(stale)}; run `make completions`\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
