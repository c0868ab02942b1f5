"""What can be asked of splitting, and what cannot be meant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.plan import DEFAULT_SHARD_BYTES
from moectl.errors import UsageError
from moectl.text import shown
from moectl.upcycle.recipe import MAX_EXPERTS, SCALES
from moectl.upcycle.split_assign import METHODS

ROUTERS = ("auto", "zero", "analytic", "random")


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """What `moectl upcycle split` was asked for.

    Attributes:
        experts: parts the FFN is cut into, each of intermediate_size / experts neurons.
        top_k: routed parts each token is sent to; None for all of them, which keeps the function.
        grouping: how neurons are grouped: balanced k-means on gate rows (kmeans-gate), on gate and up rows (kmeans) or
            on which tokens of data they are active (active: MoEfication's co-activation, by CMoE's means); or random.
        shared: of the parts, how many are always active: the neurons most often active on data (CMoE, arXiv
            2502.04416).
        router: zero (all scores equal), analytic (the mean of an expert's gate rows), random (normal), or auto: zero
            when every part is active, else analytic.
        router_std: of the random router.
        scale: what makes up for weights that sum to 1: auto, updown, down, cbrt or none (see `experts.scale_factors`).
        into, layers, aux_loss_coef, dtype, seed, shard_bytes: as in `SparseRecipe`.
    """

    experts: int = 8
    top_k: int | None = None
    grouping: str = "kmeans-gate"
    shared: int = 0
    router: str = "auto"
    router_std: float = 0.02
    scale: str = "auto"
    into: str | None = None
    layers: str = "all"
    aux_loss_coef: float = 0.01
    dtype: str = "auto"
    seed: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def routed(self) -> int:
        """How many parts the router chooses among."""
        return self.experts - self.shared

    @property
    def active(self) -> int:
        """How many of them each token is sent to."""
        return self.routed if self.top_k is None else self.top_k

    @property
    def measured(self) -> bool:
        """Whether it takes data to say which neuron goes where."""
        return self.shared > 0 or self.grouping == "active"

    @property
    def routing(self) -> str:
        """The router, decided."""
        if self.router != "auto":
            return self.router
        return "zero" if self.active == self.routed else "analytic"

    @property
    def keeps_function(self) -> bool:
        """Whether the result computes the dense function, apart from rounding to a dtype."""
        exact_scale = self.scale not in ("cbrt", "none") or self.active == 1
        return self.active == self.routed and self.routing == "zero" and exact_scale

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value out of its range, or values that contradict each other.
        """
        if not 2 <= self.experts <= MAX_EXPERTS:
            raise UsageError(
                f"--experts {shown(self.experts)} is not from 2 to {MAX_EXPERTS}.",
                "The FFN is cut into that many parts.",
                "Give another number.",
            )
        if not 0 <= self.shared < self.experts:
            raise UsageError(
                f"--shared {shown(self.shared)} of --experts {self.experts} is impossible.",
                "Shared experts are some of the parts, and the router needs at least one to choose.",
                f"Give --shared from 0 to {self.experts - 1}.",
            )
        if not 1 <= self.active <= self.routed:
            beside = f" besides {self.shared} shared" if self.shared else ""
            raise UsageError(
                f"--top-k {shown(self.active)} of {self.routed} routed experts{beside} is impossible.",
                "Each token is sent to top-k different parts of the FFN.",
                f"Give --top-k from 1 to {self.routed}.",
            )
        for name, value, known in (
            ("--method", self.grouping, METHODS),
            ("--router", self.router, ROUTERS),
            ("--scale", self.scale, SCALES),
            ("--dtype", self.dtype, ("auto", *(name for name in TORCH_NAMES if name != "float64"))),
        ):
            if value not in known:
                raise UsageError(f"{name} {shown(value)!r} is not known.", "", f"Give one of {', '.join(known)}.")
        for name, number in (("--router-std", self.router_std), ("--aux-loss-coef", self.aux_loss_coef)):
            if not (0 <= number < math.inf):
                raise UsageError(f"{name} {shown(number)} is not a finite number of at least 0.", "", "Give another.")
        if self.shard_bytes < 1:
            raise UsageError("--shard-size is below one byte.", "", "Give a size such as 5GB.")
