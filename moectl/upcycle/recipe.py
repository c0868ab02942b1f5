"""What can be asked of sparse upcycling, and what cannot be meant."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.plan import DEFAULT_SHARD_BYTES
from moectl.errors import UsageError
from moectl.text import shown

MAX_EXPERTS = 4096
"""Per layer; the most in a published checkpoint is 512."""

SCALES = ("auto", "updown", "down", "cbrt", "none")


@dataclass(frozen=True, slots=True)
class SparseRecipe:
    """What `moectl upcycle sparse` was asked for.

    Attributes:
        experts, top_k: experts per layer, and how many each token is sent to.
        into: model_type of the MoE family; None for the dense family's first.
        layers: which layers become MoE: all, every:N (the N-th, 2N-th, ...), last:N, or numbers such as 0,3,5.
        granularity: parts each copy of the FFN is cut into: experts are 1/G as wide, and there are experts / G copies
            (arXiv 2410.07524, section 3.2).
        scale: what makes up for a cut: auto, updown, down, cbrt or none (see `experts.scale_factors`).
        shared_experts: keep the dense FFN as an always-active expert beside the routed ones, half and half.
        residual: keep the dense FFN as an always-active expert, and let routed experts start at zero beside it.
        drop: share of each expert's neurons drawn anew (Drop-Upcycling, arXiv 2502.19261).
        shuffle: give each copy its own order of neurons before it is cut (Qwen2-57B-A14B, arXiv 2407.10671).
        reinit: share of each expert's weights drawn anew, one by one (the same).
        router_std: standard deviation of the normal router rows; None is the family's own: flaxformer's and Mixtral's
            0.02, or 0 where nothing else is exact.
        noise: standard deviation of the normal noise added to every expert weight, in the weights' own units.
        aux_loss_coef: load-balancing coefficient written into the config for continued training.
        dtype: "auto" keeps every tensor's own, else bfloat16, float16 or float32.
        seed: of everything random; the draws of a matrix depend on (seed, its place) alone.
        shard_bytes: largest weight file.
    """

    experts: int = 8
    top_k: int = 2
    into: str | None = None
    layers: str = "all"
    granularity: int = 1
    scale: str = "auto"
    shared_experts: bool = False
    residual: bool = False
    drop: float = 0.0
    shuffle: bool = False
    reinit: float = 0.0
    router_std: float | None = None
    noise: float = 0.0
    aux_loss_coef: float = 0.01
    dtype: str = "auto"
    seed: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def copies(self) -> int:
        """How many times the whole FFN is there."""
        return self.experts // self.granularity

    @property
    def keeps_function(self) -> bool:
        """Whether the result computes the dense function, apart from rounding to a dtype."""
        whole_copies = self.granularity == 1 or (
            self.scale not in ("cbrt", "none") and not self.top_k % self.granularity
        )
        return whole_copies and not (self.noise or self.drop or self.reinit)

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value out of its range, or values that contradict each other.
        """
        if not 1 <= self.top_k <= self.experts:
            raise UsageError(
                f"--top-k {shown(self.top_k)} of --experts {shown(self.experts)} is impossible.",
                "Each token is sent to top-k different experts.",
                f"Give --top-k from 1 to {shown(max(1, self.experts))}.",
            )
        if self.experts > MAX_EXPERTS:
            raise UsageError(
                f"--experts {shown(self.experts)} is more than {MAX_EXPERTS}.",
                "The list of tensors alone would not fit in memory.",
                "Give fewer.",
            )
        if self.granularity < 1 or self.experts % self.granularity:
            raise UsageError(
                f"--granularity {shown(self.granularity)} does not divide --experts {self.experts}.",
                "Every copy of the FFN is cut into that many experts.",
                "Give a multiple of it as --experts.",
            )
        if self.scale not in SCALES:
            raise UsageError(f"--scale {shown(self.scale)!r} is not known.", "", f"Give one of {', '.join(SCALES)}.")
        if self.granularity > 1 and self.scale == "auto" and self.top_k % self.granularity:
            raise UsageError(
                f"--top-k {shown(self.top_k)} is not a multiple of --granularity {shown(self.granularity)}.",
                "A token would get part of an FFN, and no scale makes that the dense function.",
                "Give such a multiple, or choose --scale updown, down, cbrt or none to mean it.",
            )
        if self.shared_experts and self.residual:
            raise UsageError(
                "--shared-experts and --residual exclude each other.",
                "The always-active expert gives half of the output, or all of it.",
                "Give one of the two.",
            )
        for name, value, largest in (
            ("--router-std", 0.0 if self.router_std is None else self.router_std, math.inf),
            ("--noise", self.noise, math.inf),
            ("--aux-loss-coef", self.aux_loss_coef, math.inf),
            ("--drop", self.drop, 1.0),
            ("--reinit", self.reinit, 1.0),
        ):
            if not (0 <= value <= min(largest, sys.float_info.max)):  # an int can be larger
                upper = "" if math.isinf(largest) else f" and at most {largest:g}"
                raise UsageError(
                    f"{name} {shown(value)} is not a finite number of at least 0{upper}.", "", "Give another value."
                )
        if self.dtype not in ("auto", *TORCH_NAMES) or TORCH_NAMES.get(self.dtype) == "F64":
            raise UsageError(
                f"--dtype {shown(self.dtype)!r} is not known.", "", "Give auto, bfloat16, float16 or float32."
            )
        if self.shard_bytes < 1:
            raise UsageError("--shard-size is below one byte.", "", "Give a size such as 5GB.")


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `all`, `every:N`, `last:N` or `0,3,5` names, in order.

    Raises:
        UsageError: it is none of these, or names a layer the model does not have, or none at all.
    """
    kind, _, number = text.partition(":")
    layers: tuple[int, ...] = ()
    if text == "all":
        layers = tuple(range(num_layers))
    elif kind == "every" and _is_number(number) and int(number):
        layers = tuple(range(int(number) - 1, num_layers, int(number)))
    elif kind == "last" and _is_number(number) and int(number) <= num_layers:
        layers = tuple(range(num_layers - int(number), num_layers))
    elif all(_is_number(word.strip()) for word in text.split(",")):
        layers = tuple(sorted({int(word) for word in text.split(",")}))
    if not layers or layers[-1] >= num_layers:
        raise UsageError(
            f"--layers {shown(text)!r} names no layers of a model with {num_layers}.",
            "",
            f"Give all, every:2, last:6, or numbers from 0 to {num_layers - 1} such as 0,3,5.",
        )
    return layers


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) < 10
