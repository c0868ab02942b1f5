"""The machine and the model that advice is for, as far as they are known."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families.components import component, within
from moectl.text import shown

_LINK = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(i?)(B|b|bit)\s*(?:/s|ps)\s*")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is.

    Attributes:
        gpus: over which the experts are spread.
        gpu_memory_gb: of each.
        link_gb_per_s: what a GPU sends or receives in a second: to other nodes, if there are any, else to other GPUs.
        nodes: on which the GPUs are, equally many on each.
        host_gb_per_s: at which a GPU fetches experts from the memory of its host.
        reserved: which share of a GPU's memory is for other things than weights: KV cache, activations.
    """

    gpus: int
    gpu_memory_gb: float
    link_gb_per_s: float
    nodes: int = 1
    host_gb_per_s: float = 25.0
    reserved: float = 0.3

    def __post_init__(self) -> None:
        rates = (self.gpu_memory_gb, self.link_gb_per_s, self.host_gb_per_s)
        if min(self.gpus, self.nodes) < 1 or self.gpus % self.nodes or min(rates) <= 0 or not 0 <= self.reserved < 1:
            raise UsageError(
                f"{self.gpus} GPUs on {self.nodes} nodes are no machine that there is.",
                "",
                "Give GPUs that divide by the nodes, memory and rates above 0, and a reserve from 0 to below 1.",
            )


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the model; None where nothing is.

    Attributes:
        experts_gb: of the routed experts of all layers.
        other_gb: of all else, which every GPU holds.
        hidden_size: of the model.
    """

    experts_gb: float | None = None
    other_gb: float | None = None
    hidden_size: int | None = None


def parse_link(text: str) -> float:
    """Gigabytes per second from `50GB/s`, `400Gb/s` or `25GiB/s`; a small b is a bit.

    Raises:
        UsageError: it is no rate.
    """
    match = _LINK.fullmatch(text)
    if not match or not float(match[1]):
        raise UsageError(f"{shown(text)!r} is no rate.", "", "Write it as 50GB/s, or in bits as 400Gb/s.")
    unit = {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]] if not match[3] else 1024 ** {"M": 2, "G": 3, "T": 4}[match[2]]
    return float(match[1]) * unit / (1 if match[4] == "B" else 8) / 1e9


def facts(checkpoint: Checkpoint) -> Model:
    """What a checkpoint's headers and config say, of the weights as they are on disk."""
    experts = sum(ref.nbytes for name, ref in checkpoint.tensors.items() if component(name) == "experts")
    sizes = [place[name] for place in within(checkpoint.config) for name in ("hidden_size", "d_model") if name in place]
    hidden = next((size for size in sizes if type(size) is int and size > 0), None)
    return Model(experts / 1e9, (checkpoint.nbytes - experts) / 1e9, hidden)
