"""Numbers and lists of layers in words."""

from __future__ import annotations

from collections.abc import Sequence


def layers(labels: Sequence[str]) -> str:
    """`layer 3`, or `layers 1, 4-7`: runs of numbers are joined."""
    runs: list[list[str]] = []
    for label in labels:
        if runs and label.isdigit() and runs[-1][-1].isdigit() and int(label) == int(runs[-1][-1]) + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    joined = ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' * (len(labels) > 1)} {joined}"


def percent(share: float) -> str:
    """Two digits of a share, three of large ones: 0.43%, 4.3%, 43%, 99.6%."""
    value = 100 * share
    return f"{value:.3g}%" if value >= 99 or value == 0 else f"{value:.2g}%"


def between(interval: tuple[float, float]) -> str:
    """An interval of shares."""
    return f"{percent(interval[0])} to {percent(interval[1])}"


def chance(probability: float) -> str:
    """A probability that may be too small to mean its digits."""
    return "below 1e-12" if probability < 1e-12 else f"at most {probability:.1g}"
