"""Which of the families that a test names the installed transformers has: with the locked release, all of them."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from moectl.families.releases import WORKS_SINCE, is_older
from moectl.families.tiny_moe import _config_class

_LOCKED = re.search(r"^transformers==(\S+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)


def installed(*model_types: str, since: str = "5.17") -> list[str]:
    """Those that the installed transformers has and runs rightly, and none if it is older than a release."""
    found = [each for each in model_types if not is_older(max(since, WORKS_SINCE.get(each, since))) and _known(each)]
    assert _LOCKED and (version("transformers") != _LOCKED[1] or len(found) == len(model_types)), model_types
    return found


def needs(model_type: str, since: str = "5.17") -> pytest.MarkDecorator:
    """For a test of one family: it runs where `installed` has the family."""
    reason = f"this transformers does not run {model_type} rightly"
    return pytest.mark.skipif(not installed(model_type, since=since), reason=reason)


def _known(model_type: str) -> bool:
    try:
        return bool(_config_class(model_type))
    except KeyError:
        return False
