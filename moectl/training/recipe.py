"""Everything that decides what a training computes, as data: what the same command is recognised by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moectl.checkpoint.plan import source_identity
from moectl.checkpoint.source import Checkpoint
from moectl.data.chat import is_chat
from moectl.data.mixture import Part, parse_parts
from moectl.errors import UsageError

SCHEDULES: dict[str, str] = {
    "cosine": "cosine_with_min_lr",
    "linear": "linear",
    "constant": "constant_with_warmup",
}
"""What `--schedule` may say -> the name in `transformers.get_scheduler`. All are functions of the step alone."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """One training. The number of processes is no part of it: it changes the speed and the last bits, nothing else.

    Attributes:
        data: what `--data` said, each `SPEC[:WEIGHT]`.
        batch_size: sequences per step, over all processes and micro-batches.
        accumulate: micro-batches a step is computed in.
        router_rate: learning rate of the router; None for that of the rest.
        min_rate: where a cosine ends, as a share of the peak.
        only: what is trained, one of `parameters.ONLY`.
        aux_loss, z_loss: what the balancing loss and the z-loss of every layer whose router is the family's own are
            multiplied with; an `aux_loss` of None is 0.01, and right for models without such layers too.
        bias_update: step of the selection biases, in families that have them.
        router: what takes the place of the family's router, NAME[:OPTION=VALUE,...]; it brings its own losses.
        dtype: what matrix products are computed in (autocast); weights and optimiser are float32 either way.
        implementation: of the experts; None for moectl's kernels on a GPU and transformers' default on a CPU.
    """

    data: tuple[str, ...]
    steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 512
    accumulate: int = 1
    learning_rate: float = 1e-4
    router_rate: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    min_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    only: str = "all"
    freeze_experts: bool = False
    aux_loss: float | None = None
    z_loss: float = 0.0
    bias_update: float = 0.0
    router: str | None = None
    dtype: str = "float32"
    implementation: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be carried out.

        Raises:
            UsageError: a number is out of its range, or a name is not known.
        """
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "at least 1")
        if self.sequence_length < 2:
            raise _bad("seq_len", self.sequence_length, "at least 2, one token and the next")
        if self.batch_size % self.accumulate:
            raise _bad("accumulate", self.accumulate, f"a divisor of the batch of {self.batch_size} sequences")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise _bad(name.replace("learning_rate", "lr"), getattr(self, name), "positive and finite")
        for name in ("router_rate", "warmup", "weight_decay", "aux_loss", "z_loss", "bias_update"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise _bad(name.replace("router_rate", "router_lr"), getattr(self, name), "0 or more, and finite")
        if not 0 <= self.min_rate <= 1:
            raise _bad("min_lr", self.min_rate, "a share of the peak, 0 to 1")
        if self.schedule not in SCHEDULES:
            raise _bad("schedule", self.schedule, "one of " + ", ".join(SCHEDULES))
        if self.dtype not in DTYPES:
            raise _bad("dtype", self.dtype, "one of " + ", ".join(DTYPES))
        if self.router is not None:
            self._check_router(self.router)

    def _check_router(self, router: str) -> None:
        from moectl.layerwise.routed import one_router, replaces_all

        replaced = replaces_all(one_router(router).entry)
        for name in ("aux_loss", "z_loss", "bias_update"):
            if getattr(self, name) and replaced:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for the family's own router, and --router replaces that.",
                    "A router has the losses and biases of its paper, with coefficients of its own.",
                    f"Give them to it: --router {router.partition(':')[0]}:OPTION=VALUE; `moectl routers` lists them.",
                )

    def check_processes(self, size: int) -> None:
        """Refuse a number of processes that no micro-batch can be shared out among.

        Raises:
            UsageError: a micro-batch is not a multiple of it.
        """
        if self.micro_batch % size:
            raise UsageError(
                f"A micro-batch of {self.micro_batch} sequences cannot be shared out among {size} processes.",
                f"It is the batch of {self.batch_size} in {self.accumulate} part(s), and each process takes as many.",
                f"Give a --batch-size that is a multiple of {size * self.accumulate}.",
            )

    @property
    def balance(self) -> float:
        """What the balancing loss is multiplied with."""
        return 0.01 if self.aux_loss is None else self.aux_loss

    @property
    def micro_batch(self) -> int:
        """Sequences in a micro-batch, over all processes."""
        return self.batch_size // self.accumulate

    @property
    def parts(self) -> tuple[Part, ...]:
        """The data with its weights."""
        return parse_parts(self.data)

    @property
    def has_chat(self) -> bool:
        """Whether some of the data are conversations, which need a chat template."""
        return any(is_chat(part.spec) for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    def fingerprint(self, *sources: Checkpoint) -> str:
        """sha256 over what decides the result: this, the sources' identities, the names and sizes of local data."""
        document: Mapping[str, Any] = {
            "moectl": version("moectl"),
            "recipe": self.to_json(),
            "sources": [source_identity(source) for source in sources],
            "data": [_files(part.spec) for part in self.parts],
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _files(spec: str) -> list[tuple[str, int]]:
    path = Path(spec).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, file.stat().st_size) for file in files]


def _bad(name: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} is {value}.", "", f"It has to be {wanted}.")
