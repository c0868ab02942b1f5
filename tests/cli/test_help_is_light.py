"""Help costs an interpreter and Typer: no command module imports anything heavy before its command runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_tree import leaf_commands

import moectl

HEAVY = {
    "torch",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "rich",
    "pydantic",
}

RUN_AND_LIST_MODULES = """
import sys
from moectl.cli.main import main
try:
    main()
finally:
    sys.stderr.write("\\n" + " ".join(sys.modules))
"""


def heavy_modules(*arguments: str, **environment: str) -> set[str]:
    """What of HEAVY is loaded when `moectl ARGUMENTS` has ended well."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", RUN_AND_LIST_MODULES, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: ")
    return HEAVY & set(run.stderr.split())


@pytest.mark.parametrize("command", ["", *leaf_commands()])
def test_help_loads_nothing_heavy(command):
    assert heavy_modules(*command.split(), "--help") == set()


def test_a_heavy_import_in_a_command_module_would_be_seen(tmp_path):
    copy = shutil.copytree(Path(moectl.__file__).parent, tmp_path / "moectl")
    with (copy / "cli" / "inspect.py").open("a") as module:
        module.write("\nimport numpy\n")
    assert heavy_modules("--help", PYTHONPATH=str(tmp_path)) == {"numpy"}


def test_importing_the_package_imports_nothing_else():
    program = "import sys; before = set(sys.modules); import moectl; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["moectl"]
