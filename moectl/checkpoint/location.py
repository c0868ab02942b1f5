"""From what a user typed (a directory, a Hub id, `hf://org/name@rev`) to a directory and a commit.

A directory wins if it exists; `./x`, `../x` and `/x` are always directories and never looked up on the Hub.
A revision is resolved to a commit once, so a branch that moves cannot mix two models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.errors import InputError, MachineError, MoectlError, UsageError
from moectl.text import escape

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_TOKEN = re.compile(r"hf_\w{8,}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Location:
    """A directory to read, the name to show for it, and the Hub commit it holds (None for a plain directory)."""

    path: Path
    name: str
    commit: str | None


def resolve(model: str | os.PathLike[str], revision: str | None = None, wanted: Sequence[str] = WANTED) -> Location:
    """Find `model`, fetching the files `wanted` of it into the Hugging Face cache if it is a Hub id.

    Raises:
        InputError: no such directory, repository or revision, or it is gated.
        MachineError: the Hub cannot be reached, or offline mode is on and the cache lacks the model.
        UsageError: a revision given twice, or for a directory.
    """
    text = os.fspath(model)
    if text.startswith("hf://"):
        repo_id, _, inline = text.removeprefix("hf://").partition("@")
        if inline and revision:
            raise UsageError(
                f"{escape(text)} names a revision and --revision {escape(revision)} names another.",
                "It is not clear which one is meant.",
                "Give one of the two.",
            )
        return _from_hub(repo_id, inline or revision, wanted)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib's raises for a user that is not there)
    if os.path.exists(path):  # noqa: PTH110 (pathlib's raises for a name that is too long)
        if revision:
            raise UsageError(
                f"--revision {escape(revision)} was given, but {escape(text)} is on disk.",
                "A directory has no revisions.",
                "Leave --revision out, or write hf://org/name@revision to mean the Hub.",
            )
        return Location(path, path.resolve().name, None)
    if text.startswith((".", "/", "~", "\\")) or not _HUB_ID.fullmatch(text):
        raise InputError(
            f"{escape(text)} does not exist.",
            "It was taken for a directory, since it is not of the form org/name.",
            "Check the path; Hub models are written org/name or hf://org/name@revision.",
        )
    return _from_hub(text, revision, wanted)


def _from_hub(repo_id: str, revision: str | None, wanted: Sequence[str]) -> Location:
    if not _HUB_ID.fullmatch(repo_id):
        raise InputError(f"{escape(repo_id)} is not a Hub id.", "", "Write hf://org/name or hf://org/name@revision.")
    from huggingface_hub import errors, snapshot_download

    http = errors.HTTPError  # of httpx or httpx2, as the version of the library has it

    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(wanted)))
    except (http, errors.HFValidationError, OSError) as error:
        raise _hub_error(repo_id, revision, error) from error
    # The cache names a snapshot after the commit it holds: cache/models--org--name/snapshots/<commit>.
    return Location(snapshot, repo_id, snapshot.name)


def _hub_error(repo_id: str, revision: str | None, error: Exception) -> MoectlError:
    from huggingface_hub import errors

    shown = f"hf://{repo_id}" + (f"@{escape(revision)}" if revision else "")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    sentence = escape(_TOKEN.sub("hf_***", first))
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{shown} is gated.", sentence, "Accept its terms on its Hub page and set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        return InputError(
            f"{shown} was not found, neither as a directory nor on the Hub.",
            sentence,
            "Check the spelling; for a private model set HF_TOKEN.",
        )
    return MachineError(
        f"{shown} could not be fetched.",
        sentence,
        "If a directory was meant, check its path; else the network and HF_HUB_OFFLINE, or use `hf download`.",
    )
