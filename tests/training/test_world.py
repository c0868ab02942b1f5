"""What the processes of a training say when one of them fails; with two of them in test_two_processes.py."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch import distributed

from moectl.errors import InputError, SaidElsewhere, UsageError
from moectl.training import world
from moectl.training.world import World, joined


def test_what_is_wrong_is_said_though_another_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_value: Any) -> None:
        raise RuntimeError("gloo: connection closed by peer")

    monkeypatch.setattr(distributed, "all_reduce", lost)
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(InputError, match="no such file"), two.agreed():
        raise InputError("no such file", "", "")
    with pytest.raises(RuntimeError, match="gloo"), two.agreed():
        pass


@pytest.mark.parametrize(("local", "said"), [("0", UsageError), ("1", SaidElsewhere)])
def test_one_process_of_a_machine_says_what_is_wrong_with_its_device(
    local: str, said: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "COURTESY", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(said) as caught, joined("abacus"):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert getattr(caught.value, "exit_code", None) == 2
