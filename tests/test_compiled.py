"""Loops that numba compiles at their first call."""

from __future__ import annotations

from typing import Any

from moectl.compiled import compiled


def test_a_loop_is_compiled_where_nothing_can_be_kept() -> None:
    names: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", names)  # no file: no place for compiled code either
    assert compiled(names["twice"])(21) == 42
