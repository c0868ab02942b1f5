"""From what the user names, a model to run or a recorded trace, to recordings; and what makes text of their ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.layerwise.tokenizer import load_tokenizer
from moectl.routing.ingest.formats import Facts, read
from moectl.routing.run import Settings, record
from moectl.routing.spelling import Spell, pieces
from moectl.text import escape
from moectl.traces.store import Recording, is_trace

BUILTIN = ("builtin:code", "builtin:prose", "builtin:arithmetic")


@dataclass(frozen=True)
class Study:
    """One thing that is looked at: its recordings by stream, and the checkpoint if it is a model."""

    name: str
    recordings: Mapping[str, Recording]
    checkpoint: Checkpoint | None = None


def is_model(source: str) -> bool:
    """Whether something is a checkpoint and no trace: a directory with a config.json, or nothing on this disk."""
    path = Path(source).expanduser()
    return not path.exists() or (path.is_dir() and not is_trace(path) and (path / "config.json").is_file())


def open_study(
    source: str,
    data: Sequence[str],
    settings: Settings,
    *,
    format: str | None = None,
    facts: Facts = Facts(),
    revision: str | None = None,
    say: Callable[[str], None] = lambda _text: None,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> Study | None:
    """Run a model on the data, or read a trace. None in the processes of torchrun that are not the first.

    Raises:
        UsageError, InputError, MachineError: as `record` and `ingest.read`.
    """
    if format is not None or not is_model(source):
        path = Path(source).expanduser()
        return Study(path.resolve().name, read(path, format, **asdict(facts)))
    if facts != Facts():
        raise UsageError(
            f"{escape(source)} is a model, and --num-experts, --top-k and --layers are for traces.",
            "A model knows.",
            "Leave them out.",
        )
    checkpoint = Checkpoint.open(source, revision)
    recordings = record(checkpoint, data, settings, say, advance)
    return Study(checkpoint.name, recordings, checkpoint) if recordings else None


def speller(study: Study, tokenizer: str | None) -> Spell | None:
    """What makes text of the study's token ids: its own tokenizer, or that of the model that is named; else None."""
    checkpoint = study.checkpoint if tokenizer is None else Checkpoint.open(tokenizer)
    return None if checkpoint is None else partial(pieces, load_tokenizer(checkpoint))
