"""`moectl compress qmoe` as tests run it: on tiny models, in this process, or in one of its own that may end badly."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from click.testing import Result
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app, main
from moectl.data.tokens import byte_tokenizer
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet

COUNTING = [f"{start}: " + " ".join(str(start + i) for i in range(60)) for start in range(0, 2000, 31)]
LETTERS = [" ".join(chr(97 + (start * i) % 26) * 3 for i in range(80)) for start in range(1, 80)]
SMALL = ("--samples", 6, "--seq-len", 32, "--min-tokens", 4, "--no-eval")
LAYERS, EXPERTS = 3, 8


@contextmanager
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: forcing hundreds of files to a disk takes longer than all the rest."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as directory:
        yield Path(directory)


def made_moe(path: Path, **changes: Any) -> Any:
    """A tiny model in bfloat16 whose tokens are bytes, on disk with its tokenizer, and in memory."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 258}
    with quiet():
        model = tiny_moe("qwen3_moe", bos_token_id=256, eos_token_id=256, **(sizes | changes))
        model.to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model


def texts(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def words(model: Path, out: Path, *options: Any, data: Path | None = None) -> list[str]:
    """The command, without the program's name."""
    given = [] if data is None else ["--data", str(data)]
    return ["compress", "qmoe", str(model), "-o", str(out), *given, *map(str, options)]


def compress(model: Path, out: Path, *options: Any, data: Path | None = None) -> Result:
    """In this process; an error is the result's `exception`."""
    return CliRunner().invoke(app, words(model, out, *options, data=data))


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or the number of the signal that killed it, negative."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Process:
    """The program in a process of its own."""

    number: int
    place: TemporaryDirectory[str]

    def wait(self) -> Ended:
        _, status = os.waitpid(self.number, 0)
        out, err = ((Path(self.place.name) / name).read_text() for name in ("out", "err"))
        self.place.cleanup()
        return Ended(os.waitstatus_to_exitcode(status), out, err)


def started(arguments: list[str], change: Callable[[], object] = lambda: None, **environment: str) -> Process:
    """The program in a fork of this process, so that torch is there at once; `change` is done in it first."""
    place = TemporaryDirectory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, and they are idle
        number = os.fork()
    if number:
        return Process(number, place)
    code: Any = 70
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(place.name) / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["moectl", *arguments]
        os.environ.update(environment)
        change()
        main()
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def program(arguments: list[str], change: Callable[[], object] = lambda: None, **environment: str) -> Ended:
    """`started`, and waited for."""
    return started(arguments, change, **environment).wait()


def strict(text: str) -> Any:
    """JSON in which nothing is NaN or infinite."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def names(directory: Path) -> list[str]:
    """What is in a directory."""
    return sorted(path.name for path in directory.iterdir())


def raw(checkpoint: Checkpoint, name: str) -> bytes:
    """The bytes of a tensor."""
    return checkpoint.read(name).tobytes()
