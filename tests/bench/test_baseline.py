"""The gate: faster passes, slower fails, and rows that come, go or break are told."""

import copy
import json

import pytest

from moectl.bench.baseline import compare, parse_limit, read
from moectl.errors import CheckFailed, InputError, UsageError


def document(**times):
    rows = [
        {"backend": name, "model": "m", "dtype": "float32", "what": "fwd", "tokens": 8, "p50_ms": time}
        for name, time in times.items()
    ]
    settings = {"routing": "uniform"}
    return {"schema": "moectl.bench/1", "kind": "layer", "device": {"name": "x"}, "settings": settings, "rows": rows}


def test_faster_and_a_little_slower_pass():
    found = compare(document(a=0.5, b=1.04), document(a=1.0, b=1.0))
    assert found.ratios == {"a m float32 fwd T=8": 0.5, "b m float32 fwd T=8": 1.04}
    found.require(0.05)


def test_slower_fails_naming_the_row():
    found = compare(document(a=0.5, b=1.06), document(a=1.0, b=1.0))
    with pytest.raises(CheckFailed, match=r"b m float32 fwd T=8 takes 1.06 times") as failure:
        found.require(0.05)
    assert failure.value.exit_code == 5 and "a m" not in failure.value.what


def test_rows_that_come_go_and_break():
    found = compare(document(a=1.0, new=1.0, broken=None), document(a=1.0, gone=1.0, broken=1.0))
    assert found.gone == ["gone m float32 fwd T=8"] and found.new == ["new m float32 fwd T=8"]
    with pytest.raises(CheckFailed, match=r"broken .* was measured and fails now"):
        found.require(10)


def test_other_options_are_other_rows():
    then = document(a=1.0)
    now = copy.deepcopy(then) | {"settings": {"routing": "zipf:1.2", "graph": True}}
    found = compare(now, then)
    assert not found.ratios and found.gone == ["a m float32 fwd T=8"]
    assert found.new == ["a m float32 fwd T=8 zipf:1.2 graph"]


def test_other_machines_are_not_compared():
    with pytest.raises(UsageError, match="another device"):
        compare(document(a=1.0), document(a=1.0) | {"device": {"name": "y"}})
    with pytest.raises(UsageError, match="another kind"):
        compare(document(a=1.0), document(a=1.0) | {"kind": "model"})


@pytest.mark.parametrize(
    ("option", "where", "name"),
    [
        ("--threads", "device", "threads"),
        ("--clock", "settings", "clock"),
        ("--prompt", "settings", "prompt"),
        ("--batch", "settings", "batch"),
        ("--new-tokens", "settings", "new_tokens"),
    ],
)
def test_options_that_all_rows_share_have_to_agree(option, where, name):
    then, now = document(a=1.0), document(a=1.0)
    then[where][name], now[where][name] = 1, 2
    with pytest.raises(UsageError, match=f"another {option}: 1, this is 2"):
        compare(now, then)


def test_limits():
    assert parse_limit("5%") == parse_limit("0.05") == 0.05
    for text in ("", "five", "-1%", "5 percent"):
        with pytest.raises(UsageError):
            parse_limit(text)


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / "r.json"
    for text in ("", "[]", "{}", '{"schema": "other/1", "rows": []}', '{"schema": "moectl.bench/1", "rows": [1]}'):
        path.write_text(text)
        with pytest.raises(InputError):
            read(path)
    path.write_text(json.dumps(document(a=1.0)))
    assert read(path)["rows"][0]["backend"] == "a"
