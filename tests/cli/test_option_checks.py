"""What no command could use is refused by every command alike, before a model is so much as looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_tree import leaf_commands
from typer.main import get_command
from typer.testing import CliRunner

from moectl.cli import checks
from moectl.cli.main import app
from moectl.errors import UsageError

WRITTEN = ("out", "output", "html", "trace", "placement")


def commands_with(*names: str) -> list[tuple[str, str]]:
    """Each command that has an option of these names, and the option as it is typed."""
    pairs = []
    for command in leaf_commands():
        found: Any = get_command(app)
        for word in command.split():
            found = found.commands[word]
        options = [each for each in found.params if each.name in names and each.opts[0].startswith("-")]
        pairs += [(command, each.opts[0]) for each in options]
    return pairs


def refused(command: str, option: str, value: str) -> UsageError:
    error = CliRunner().invoke(app, [*command.split(), option, value]).exception
    assert isinstance(error, UsageError)
    return error


@pytest.mark.parametrize("command", [command for command, _option in commands_with("device")])
def test_an_unknown_device_is_a_usage_error(command: str) -> None:
    error = refused(command, "--device", "tpu")
    assert (error.what, error.fix) == ("--device 'tpu' is not known.", "Give auto, cpu or cuda.")


@pytest.mark.parametrize(("command", "option"), commands_with(*WRITTEN))
def test_a_place_inside_a_file_is_a_usage_error(command: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    error = refused(command, option, str(tmp_path / "notes" / "deep" / "place"))
    assert error.what == f"{tmp_path / 'notes'} is a file."
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(("command", "option"), commands_with("output", "html", "placement"))
def test_a_file_that_is_a_directory_is_a_usage_error(command: str, option: str, tmp_path: Path) -> None:
    assert refused(command, option, str(tmp_path)).what == f"{tmp_path} is a directory."


def test_places_that_can_be_made_are_taken(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for path in (tmp_path / "new" / "deep", tmp_path / "notes", tmp_path, Path("/"), None):
        assert checks.place(path) == path
    for path in (tmp_path / "new" / "deep", tmp_path / "notes", None):
        assert checks.file(path) == path


@pytest.mark.parametrize(
    "words", ["average {0} {0} -o {0}/o --shard-size lots", "analyze-routing {0} --trace-size lots"]
)
def test_a_size_that_is_none_is_named_with_its_option(words: str, tmp_path: Path) -> None:
    error = CliRunner().invoke(app, words.format(tmp_path).split()).exception
    assert isinstance(error, UsageError) and error.what == f"{words.split()[-2]} 'lots' is not a size."


def test_branches_are_not_put_into_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["branch", str(tmp_path / "seed"), "-o", str(tmp_path), "--data", "builtin:code"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, UsageError) and error.what == f"{tmp_path} is a checkpoint."
