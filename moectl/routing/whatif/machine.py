"""The machine and the model that advice is for, as far as they are known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families.components import component, within
from moectl.routing.whatif.asked import MOST_GPUS
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
        if not 1 <= self.nodes <= self.gpus <= MOST_GPUS or self.gpus % self.nodes:
            raise UsageError(
                f"{self.gpus} GPUs on {self.nodes} nodes are no machine that there is.",
                "",
                f"Give --gpus and --nodes so that every node has as many GPUs, {MOST_GPUS:,} in all at most.",
            )
        if not all(0 < each < inf for each in (self.gpu_memory_gb, self.link_gb_per_s, self.host_gb_per_s)):
            raise UsageError(
                f"GPUs with {self.gpu_memory_gb:g} GB and a link of {self.link_gb_per_s:g} GB/s are no machine that "
                "there is.",
                "",
                "Give --gpu-memory and --link above 0, as --gpu-memory 80 --link 50GB/s.",
            )
        if not 0 <= self.reserved < 1:
            raise UsageError(
                f"A machine that keeps {self.reserved:g} of its memory is no machine for a model.",
                "",
                "Reserve from 0 to below 1.",
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


def facts(checkpoint: Checkpoint, part: float = 1.0) -> Model:
    """What a checkpoint's headers and config say, of the weights as they are on disk.

    Args:
        part: of the experts, how many are asked about, as those of an encoder alone.
    """
    experts = sum(ref.nbytes for name, ref in checkpoint.tensors.items() if component(name) == "experts")
    sizes = [place[name] for place in within(checkpoint.config) for name in ("hidden_size", "d_model") if name in place]
    hidden = next((size for size in sizes if type(size) is int and size > 0), None)
    return Model(part * experts / 1e9, (checkpoint.nbytes - experts) / 1e9, hidden)
