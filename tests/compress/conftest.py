"""A model and text to compress, what becomes of them undisturbed, a place for outputs; other files have their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qmoe_attacks import asked
from qmoe_runs import (
    COUNTING,
    made_moe,
    memory,
    texts,
)
from trees import tree
from typer.testing import CliRunner

from moectl.cli.main import app
from moectl.compress.pipeline import preflight
from moectl.compress.pipeline import settings as pipeline_settings


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A model and text that tests leave as they are, and what becomes of them undisturbed."""
    with memory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_SPEED_SECONDS", 0.0)
        patch.setattr(pipeline_settings, "MICRO_BATCH_TOKENS", 64)  # so that there are several micro-batches
        made_moe(directory / "moe")
        texts(directory / "counting.jsonl", COUNTING)
        for out in ("clean", "again"):  # here, so that every fork begins with what it has to import
            done = CliRunner().invoke(app, asked(directory, directory / out / "q"))
            assert done.exit_code == 0, done.exception
        assert tree(directory / "again") == tree(directory / "clean")
        yield directory


@pytest.fixture(scope="module")
def clean(place: Path) -> dict[str, str]:
    return tree(place / "clean" / "q")


@pytest.fixture
def room() -> Iterator[Path]:
    """Where outputs go."""
    with memory() as directory:
        yield directory
