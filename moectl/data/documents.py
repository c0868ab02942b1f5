"""From `--data` to documents: the same sources, the same domains and the same held-out tenth for every command.

A spec is `builtin:NAME`, a file, a directory of files, or a Hub dataset `org/name[:split]`. A local path wins over a
Hub id; `./x`, `../x` and `/x` are never looked up on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from moectl.data.builtin import BUILTIN
from moectl.data.files import READERS, read_directory
from moectl.data.hub import read_hub
from moectl.errors import InputError
from moectl.text import escape

Split = Literal["train", "heldout", "all"]

_BUILTIN_PREFIX = "builtin:"
EVERY_BUILTIN = tuple(_BUILTIN_PREFIX + name for name in BUILTIN)
"""What is read where no `--data` is given."""

_HUB_DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+))?")
_HELDOUT_BYTES = 26  # of the 256 values of a hash's first byte: 10.2 % of all documents


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the domain it belongs to."""

    text: str
    domain: str


@dataclass(frozen=True, slots=True)
class Source:
    """What one spec names: `texts()` starts reading it, from the beginning each time."""

    spec: str
    domain: str
    texts: Callable[[], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of some sources that are in a split; each iteration reads them again.

    The sources are mixed so that any prefix holds about as many characters of each, until one is exhausted. Texts of
    white space alone are left out.
    """

    sources: tuple[Source, ...]
    split: Split

    def __iter__(self) -> Iterator[Document]:
        """Read the documents.

        Raises:
            InputError: a file is not what its name says, or a source has no document in this split.
            MachineError: the Hub cannot be reached, or a library is missing.
        """
        streams = {index: self._read(source) for index, source in enumerate(self.sources)}
        characters = dict.fromkeys(streams, 0)
        while streams:
            index = min(streams, key=characters.__getitem__)
            document = next(streams[index], None)
            if document is None:
                del streams[index]
                continue
            characters[index] += len(document.text)
            yield document

    def by_domain(self) -> dict[str, Documents]:
        """The same documents, one collection per domain, in the order of the sources."""
        domains = dict.fromkeys(source.domain for source in self.sources)
        return {
            domain: Documents(tuple(source for source in self.sources if source.domain == domain), self.split)
            for domain in domains
        }

    def _read(self, source: Source) -> Iterator[Document]:
        found = kept = 0
        for text in source.texts():
            if not text or text.isspace():
                continue
            found += 1
            if self.split in ("all", split_of(text)):
                kept += 1
                yield Document(text, source.domain)
        if not kept:
            raise _empty(source, self.split, found)


def read_documents(specs: Sequence[str], split: Split = "train") -> Documents:
    """The documents that `--data` names; they are read when iterated, lazily, as often as asked.

    Raises:
        InputError: a spec names nothing that can be read.
    """
    if not specs:
        raise InputError(
            "No data was given.", "There is nothing to read.", "Give --data a file, or builtin:" + "|".join(BUILTIN)
        )
    return Documents(tuple(_source(spec) for spec in specs), split)


def split_of(text: str) -> Literal["train", "heldout"]:
    """The split of a text, by its hash alone: the same in every file, order, command and release."""
    return "heldout" if sha256(text.encode()).digest()[0] < _HELDOUT_BYTES else "train"


def _source(spec: str) -> Source:
    if spec.startswith(_BUILTIN_PREFIX):
        name = spec.removeprefix(_BUILTIN_PREFIX)
        if name not in BUILTIN:
            known = ", ".join(EVERY_BUILTIN)
            raise InputError(f"There is no built-in text {escape(name)!r}.", "", f"Choose from {known}.")
        return Source(spec, name, BUILTIN[name])
    path = Path(spec).expanduser()
    if path.is_dir():
        return Source(spec, path.resolve().name, partial(read_directory, path))
    endings = ", ".join(READERS)
    if path.exists():
        if path.suffix not in READERS:
            raise InputError(
                f"{escape(spec)} does not end in one of {endings}.",
                "The ending says how to read a data file.",
                "Convert it to JSON lines, one object with a `text` per line, in a file that ends in .jsonl.",
            )
        return Source(spec, path.stem, partial(READERS[path.suffix], path))
    dataset = _HUB_DATASET.fullmatch(spec)
    if dataset is None or path.suffix in READERS:
        raise InputError(
            f"{escape(spec)} does not exist.",
            "It was taken for a path, since it is not of the form org/name or org/name:split.",
            f"Give a file ({endings}), a directory of such, a Hub dataset, or builtin:" + "|".join(BUILTIN) + ".",
        )
    return Source(spec, dataset["id"], partial(read_hub, dataset["id"], dataset["split"] or "train"))


def _empty(source: Source, split: Split, found: int) -> InputError:
    if not found:
        return InputError(
            f"{escape(source.spec)} holds no text.",
            "There is nothing to read.",
            "Give data with at least one document.",
        )
    name = "held-out" if split == "heldout" else split
    return InputError(
        f"None of the {found} document(s) of {escape(source.spec)} is in the {name} split.",
        "A hash of its text puts one document in ten into the held-out split and the others into training.",
        "Give more documents: a text file is one, a .jsonl file has one per line.",
    )
