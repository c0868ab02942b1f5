"""How routing settled over the checkpoints of a training: what each had of the last, and how late choices changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moectl.routing.analysis import plain
from moectl.routing.words import percent
from moectl.traces.change import Fluctuation, Saturation, fluctuation, saturation
from moectl.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Course:
    """Checkpoints in their order, of one stream of the same tokens; each but the last is compared with the last.

    Attributes:
        names: of all checkpoints, the last too.
        saturation: for each but the last, an entry per layer.
        fluctuation: an entry per layer, with a share for each but the last.
    """

    names: tuple[str, ...]
    saturation: tuple[tuple[Saturation, ...], ...]
    fluctuation: tuple[Fluctuation, ...]

    def told(self, stream: str) -> str:
        """In words, means over the layers."""
        had = ", ".join(
            f"{name} {percent(_mean([each.value for each in layers]))} "
            f"(chance {percent(_mean([each.chance_loads for each in layers]))})"
            for name, layers in zip(self.names, self.saturation, strict=False)
        )
        late = ", ".join(
            f"{name} {percent(_mean([each.share_C[number] for each in self.fluctuation]))}"
            for number, name in enumerate(self.names[:-1])
        )
        return (
            f"Towards {self.names[-1]}, {stream}: of a token's experts there, these were its experts before: {had}. "
            f"First choices that were still others at or after each: {late}. Means over the layers."
        )

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "checkpoints": list(self.names),
            "saturation": {name: plain(layers) for name, layers in zip(self.names, self.saturation, strict=False)},
            "fluctuation": plain(self.fluctuation),
        }


def course(names: Sequence[str], traces: Sequence[RoutingTrace]) -> Course:
    """What the routing of the same tokens did over at least two checkpoints, in their order.

    Raises:
        InputError: the traces are not of the same tokens and points.
    """
    *earlier, last = traces
    settled = tuple(fluctuation(traces))
    return Course(tuple(names), tuple(tuple(saturation(one, last)) for one in earlier), settled)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
