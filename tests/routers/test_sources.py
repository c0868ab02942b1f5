"""Each router says in its docstrings where it comes from: papers, the place in them, and who builds it otherwise."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

from moectl.routers.entry import Entry
from moectl.routers.registry import ROUTERS, find

PLACE = re.compile(r"\b(?i:sections?|appendix|eqs?\.|equations?|algorithms?|figures?|tables?)\s+(\"|[A-Z]?\d|[A-Z]\b)")
REPOSITORY = re.compile(r"[A-Za-z][\w-]+/\w\w")
NAMED = re.compile(rf"\bnone\b|transformers|`|{REPOSITORY.pattern}")
"""Whom a paragraph of implementations speaks of: nobody, a repository, a class or function."""


def docstrings(entry: Entry) -> tuple[str, str]:
    """Of the module, and of the class: what `moectl routers NAME` prints."""
    kind = entry.load()
    return sys.modules[kind.__module__].__doc__ or "", inspect.cleandoc(kind.__doc__ or "")


def missing(entry: Entry, module: str, own: str) -> list[str]:
    """What the docstrings do not say."""
    both = module + "\n\n" + own
    found = [paper for paper in entry.papers if paper not in both]
    if entry.papers and not PLACE.search(own):
        found.append("a section, equation, algorithm or figure")
    if not entry.papers and "no paper" not in both.lower():
        found.append("that there is no paper")
    paragraph = next((each for each in own.split("\n\n") if each.startswith("Implementations: ")), "")
    if len(paragraph.split()) < 4 or not paragraph.rstrip().endswith("."):
        found.append("a paragraph of implementations")
    elif not NAMED.search(paragraph) or (entry.same_as and "transformers" not in paragraph):
        found.append("whose implementations")
    elif paragraph.startswith("Implementations: none") and REPOSITORY.search(entry.source):
        found.append("the implementation that is its source")
    return found


@pytest.mark.parametrize("entry", ROUTERS, ids=lambda entry: entry.name)
def test_a_router_names_its_paper_the_place_in_it_and_its_implementations(entry: Entry) -> None:
    assert not missing(entry, *docstrings(entry))


WHOLE = "A gate (arXiv 2401.04088, section 2.1).\n\nImplementations: transformers and another, and both agree."
REMOE = "A gate (arXiv 2412.14711, section 3).\n\nImplementations: Fsoft-AIC/LibMoE is public."


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("mixtral", WHOLE, []),
        ("mixtral", WHOLE.replace("2401.04088", "2401.04089"), ["2401.04088"]),
        ("mixtral", WHOLE.replace("section 2.1", "in a section"), ["a section, equation, algorithm or figure"]),
        ("mixtral", WHOLE.replace("Implementations:", "Elsewhere:"), ["a paragraph of implementations"]),
        ("mixtral", WHOLE.replace("transformers and another, and", ""), ["a paragraph of implementations"]),
        ("mixtral", WHOLE.replace("transformers", "others"), ["whose implementations"]),
        ("mixtral", WHOLE.replace("transformers", "mistral/inference"), ["whose implementations"]),
        ("remoe", REMOE, []),
        ("remoe", REMOE.replace("Fsoft-AIC/LibMoE is", "some are"), ["whose implementations"]),
        ("remoe", REMOE.replace("Fsoft-AIC/LibMoE", "none"), ["the implementation that is its source"]),
        ("gemma4", WHOLE.replace("A gate", "There is no paper"), []),
        ("gemma4", WHOLE, ["that there is no paper"]),
    ],
)
def test_what_is_left_out_is_seen(name: str, text: str, found: list[str]) -> None:
    assert missing(find(name), "", text) == found
