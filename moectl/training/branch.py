"""Branching: one independent training of the same seed model per domain, the first stage of Branch-Train-MiX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moectl.data.documents import read_documents
from moectl.errors import UsageError
from moectl.text import escape
from moectl.training.recipe import TrainRecipe


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the trainings: its domain, its recipe, the directory it makes."""

    domain: str
    recipe: TrainRecipe
    out: Path


def branches(recipe: TrainRecipe, directory: Path, only: Sequence[str] = ()) -> list[Branch]:
    """The trainings of a recipe, one for each of its `--data`, into `directory`/DOMAIN; `only` picks some by domain.

    They know nothing of each other: any of them may run anywhere and at any time (arXiv 2403.07816, section 3.1).

    Raises:
        InputError: a data source does not exist.
        UsageError: two sources have one domain, a domain is no name of a directory, or `only` names none of them.
    """
    found: dict[str, Branch] = {}
    for text, part in zip(recipe.data, recipe.parts, strict=True):
        domain = read_documents([part.spec]).sources[0].domain.replace("/", "--")
        if domain in found or domain in ("", ".", ".."):
            raise UsageError(
                f"{escape(text)} has the domain {escape(domain)!r}, "
                + ("as another one has." if domain in found else "which is no name for a directory."),
                "Each branch is written to a directory called like its domain.",
                "Rename the file or directory.",
            )
        found[domain] = Branch(domain, replace(recipe, data=(part.spec,)), directory / domain)
    unknown = [name for name in only if name not in found]
    if unknown:
        raise UsageError(
            f"There is no domain {escape(unknown[0])!r}.", "", f"Choose from {', '.join(map(escape, found))}."
        )
    return [branch for domain, branch in found.items() if not only or domain in only]
