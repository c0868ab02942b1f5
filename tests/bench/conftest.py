"""A small layer, peers that can be planted, and a roof that is given instead of measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from small_layer import ROOF, SMALL

from moectl.bench import device as machine
from moectl.bench import peers
from moectl.bench.sweep import Settings


@pytest.fixture
def settings() -> Settings:
    return Settings(
        [SMALL], [1, 5], ["fwd"], ["float32"], ["moectl", "grouped_mm", "loop"], device="cpu", seconds=0.001
    )


@pytest.fixture
def roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device can do, without a second of measuring."""
    monkeypatch.setattr(machine, "measure_roof", lambda *_: ROOF)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Add a peer with the given `build` to the registry."""

    def add(name: str, build: Any) -> None:
        module = ModuleType(f"{peers.__name__}.{name}")
        module.build = build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, "planted by a test"))

    yield add
