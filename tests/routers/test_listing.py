"""`moectl routers`: every router named by the literature's list, each option explained."""

from __future__ import annotations

import inspect

import pytest

from moectl.errors import UsageError
from moectl.routers.listing import described, listing
from moectl.routers.registry import ROUTERS, names
from moectl.routers.spelling import parse


def test_names_are_unique_and_classes_are_there():
    assert len({each.name for each in ROUTERS}) == len(ROUTERS)
    assert all(inspect.isclass(each.load()) for each in ROUTERS)


@pytest.mark.parametrize("name", [*names("router"), *names("slots")])
def test_every_option_is_explained(name):
    found = described(name)
    assert found["about"] and all(option["meaning"] for option in found["options"])
    assert {type(option["default"]) for option in found["options"]} <= {int, float, bool, str}


def test_unverified_means_without_a_source_and_says_so():
    for each, row in zip(ROUTERS, listing(), strict=True):
        said = "nverified" in (each.load().__doc__ or "")
        assert (row["status"] == "unverified") == (not each.source)
        assert said == (not each.source), each.name


def test_options_are_read_as_their_defaults_are():
    switch, choice, v3 = parse("switch:cf=1.5,aux=0,expert-choice,deepseek-v3:groups=2,top=1,normalize=no")
    assert switch.options().capacity_factor == 1.5 and switch.options().aux_loss == 0.0
    assert choice.given == {}
    options = v3.options(top_k=3)
    assert (options.groups, options.top_groups, options.normalize, options.top_k) == (2, 1, False, 3)
    assert [each.text for each in (switch, choice)] == ["switch:cf=1.5,aux=0", "expert-choice"]


@pytest.mark.parametrize("text", ["cf=1", "nobody", "switch:cf", "switch:=1", "switch:cf=x", "switch:groups=1", ""])
def test_what_makes_no_sense_is_refused(text):
    with pytest.raises(UsageError):
        [each.options() for each in parse(text)]


@pytest.mark.parametrize("text", ["switch:cf=-1", "gshard:cf=-0.5", "expert-choice:cf=0", "mixtral:k=9", "mixtral:k=0"])
def test_options_that_would_route_nobody_are_refused(text):
    (named,) = parse(text)
    with pytest.raises(ValueError, match=r"capacity_factor|top_k"):
        named.entry.load()(None, 8, named.options())
