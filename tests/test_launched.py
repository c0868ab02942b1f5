"""Which process this is, by what a launcher says."""

from __future__ import annotations

import pytest

from moectl.errors import UsageError
from moectl.launched import local_rank, rank_and_size


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, (0, 1)), ({"RANK": "3"}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4))],
)
def test_rank_and_size(environment: dict[str, str], found: tuple[int, int]) -> None:
    assert rank_and_size(environment) == found


@pytest.mark.parametrize(
    ("rank", "size", "said"), [("x", "2", "RANK is 'x'"), ("0", "-1", "WORLD_SIZE is '-1'"), ("2", "2", "impossible")]
)
def test_what_makes_no_sense_is_refused(rank: str, size: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rank_and_size({"RANK": rank, "WORLD_SIZE": size})


def test_the_rank_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_rank() == 5
