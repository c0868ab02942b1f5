"""What a person sees: bars that keep the order, nothing wider than the terminal, nothing that needs colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
import synthetic

from moectl.routing import terminal
from moectl.routing.analysis import Analysis, analyse
from moectl.routing.report import Report
from moectl.traces.store import Recording


class Screen(io.StringIO):
    """A terminal that remembers."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def analysed(**kind: object) -> Analysis:
    return analyse("made", {"decoder": synthetic.recording(synthetic.trace(**kind))})  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", [8, 64, 200])
def test_the_strip_is_a_line_per_layer_sorted_or_by_number(experts: int) -> None:
    found = analysed(experts=experts, collapsed=[1], layers=3, unseen={0: [0]})
    for width in (80, 200):
        lines = terminal.strip(found, width)
        assert len(lines) == 3 and all(len(line) <= min(width, terminal.MOST_COLUMNS + 4) for line in lines)
        bars = [line.split("|")[1] for line in lines]
        assert all(list(bar) == sorted(bar, key=terminal.BLOCKS.index, reverse=True) for bar in bars)
        assert bars[1].count("█") == max(1, 2 // -(-experts // len(bars[1]))), "only the experts that are used"
    if experts <= 64:
        by_number = terminal.strip(found, 80, by_number=True)[0].split("|")[1]
        assert by_number[0] == " " and len(by_number) == experts, "expert 0 is not seen, and stands first"


def test_without_block_characters_there_are_others() -> None:
    found = analysed()
    for encoding in ("ascii", "cp1252", "no-such-encoding"):
        assert all(line.isascii() for line in terminal.strip(found, encoding=encoding))
        assert all(str(cell).isascii() for row in terminal.table(found, encoding)[1] for cell in row)
    assert any(not line.isascii() for line in terminal.strip(found))


def test_bars_are_as_high_as_their_values() -> None:
    bar = terminal.spark(np.array([0.0, 1e-9, 0.5, 1.0]), 4)
    assert bar == " ▁▄█" and len(terminal.spark(np.arange(1000.0), 12)) <= 12
    assert terminal.spark(np.zeros(3), 3) == "   "


def test_pooling_keeps_the_mean() -> None:
    values = np.arange(130.0)
    pooled = terminal.pooled(values, 128)
    assert len(pooled) == 65 and pooled[0] == 0.5 and pooled.mean() == pytest.approx(values.mean())


@pytest.mark.parametrize(
    ("environment", "half_blocks"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_only_where_it_is_wanted(
    environment: dict[str, str], half_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Screen()
    terminal.print_strip(analysed(), screen, 80)
    assert ("▀" in screen.getvalue()) == ("\x1b[" in screen.getvalue()) == half_blocks
    assert len(screen.getvalue().splitlines()) == 1 + (2 if half_blocks else 4)


def test_a_pipe_gets_numbers_alone() -> None:
    columns, rows = terminal.full(Report(analysed(collapsed=[2])))
    assert columns[:4] == ["stream", "layer", "experts", "top_k"] and columns[-1] == "flags"
    assert rows[2][columns.index("max_vio")] == 3.0 and rows[2][columns.index("max_vio_fair")] < 0.2
    assert "collapsed" in str(rows[2][-1])


def test_hostile_names_cannot_drive_the_terminal() -> None:
    made = synthetic.trace(synthetic.tokens(domains=("\x1b[31mred", "b\nb", "c")), by_domain=3.0)
    found = analyse("\x1b[2J", {"decoder": synthetic.recording(made)})
    other = analyse("\x1b[2K", {"decoder": synthetic.recording(synthetic.trace(seed=4))})
    assert isinstance(found.streams[0].recording, Recording)
    assert not any("\x1b" in line or "\n" in line for line in terminal.words(Report(found, other)))
