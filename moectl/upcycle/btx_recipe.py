"""What can be asked of Branch-Train-MiX, by options or in a recipe file, and what cannot be meant."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from moectl.checkpoint.plan import DEFAULT_SHARD_BYTES
from moectl.errors import UsageError
from moectl.text import shown
from moectl.upcycle.recipe import MAX_EXPERTS, SCALES, SparseRecipe

ROUTER_INITS = ("random", "text", "embedding")
ROUTER_TOKENS = ("all", "last")


def _doc(text: str, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"doc": text, "choices": choices}


@dataclass(frozen=True, slots=True)
class Expert:
    """One model whose FFN becomes an expert; the metadata of its fields is what `moectl recipe schema` prints."""

    model: str = field(metadata=_doc("Directory, Hub id, hf://org/name@rev, or base+adapter (a PEFT LoRA)."))
    prompts: tuple[str, ...] = field(default=(), metadata=_doc("Texts that should be routed to it."))
    negative_prompts: tuple[str, ...] = field(default=(), metadata=_doc("Texts that should not; a mean to subtract."))
    data: tuple[str, ...] = field(default=(), metadata=_doc("Data to take texts from, as --data has it."))
    noise: float | None = field(default=None, metadata=_doc("Deviation of noise on its weights; else the recipe's."))
    residual_scale: float = field(default=1.0, metadata=_doc("What its down projection is multiplied by."))


@dataclass(frozen=True, slots=True)
class BtxRecipe:
    """What `moectl upcycle btx` was asked for (BTX, arXiv 2403.07816, section 2.2); every field says what it is."""

    experts: tuple[Expert, ...] = field(metadata=_doc("The models: each is one expert of every MoE layer."))
    include_seed: Expert | None = field(
        default=None, metadata=_doc("The model they branched from: one more expert, and in the mean.")
    )
    base: str | None = field(
        default=None, metadata=_doc("Whose tokenizer is kept and who reads the texts; else the seed or first expert.")
    )
    shared_expert: Expert | None = field(
        default=None, metadata=_doc("A model whose FFN is always active, scaled by a sigmoid gate.")
    )
    average: str = field(
        default="mean", metadata=_doc("Everything but FFNs: mean, base, or one weight per expert, such as 2,1,1.")
    )
    into: str | None = field(default=None, metadata=_doc("MoE family to write; else the family's default."))
    layers: str = field(
        default="all", metadata=_doc("MoE layers: all, every:2, last:6, or 0,3,5; the others hold the mean FFN.")
    )
    top_k: int = field(default=2, metadata=_doc("Experts each token is sent to."))
    split: int = field(default=1, metadata=_doc("Experts each FFN is cut into."))
    scale: str = field(default="auto", metadata=_doc("What makes up for the cut.", SCALES))
    router_init: str = field(
        default="random",
        metadata=_doc("Router rows: random, from the experts' texts, or from their embeddings.", ROUTER_INITS),
    )
    router_std: float = field(default=0.02, metadata=_doc("Standard deviation of random router rows."))
    router_logit_std: float = field(
        default=1.0, metadata=_doc("Standard deviation over experts of the logits on the texts.")
    )
    router_tokens: str = field(default="all", metadata=_doc("Which tokens of a text count.", ROUTER_TOKENS))
    noise: float = field(default=0.0, metadata=_doc("Standard deviation of noise added to every expert weight."))
    aux_loss_coef: float = field(default=0.01, metadata=_doc("Load-balancing loss coefficient in the config."))
    dtype: str = field(default="auto", metadata=_doc("Type to write.", ("auto", "bfloat16", "float16", "float32")))
    seed: int = field(default=0, metadata=_doc("Seed of everything random."))
    shard_bytes: int = field(default=DEFAULT_SHARD_BYTES, metadata=_doc("Largest weight file."))
    allow_tokenizer_mismatch: bool = field(
        default=False, metadata=_doc("Mix models whose tokenizers differ all the same.")
    )

    @property
    def members(self) -> tuple[Expert, ...]:
        """The experts, and last the seed if it is one."""
        return (*self.experts, *((self.include_seed,) if self.include_seed else ()))

    @property
    def base_model(self) -> str:
        """The model that side files come from, that reads the texts, and that `--average base` keeps."""
        return self.base or (self.include_seed or self.experts[0]).model

    @property
    def num_experts(self) -> int:
        """Routed experts of every MoE layer."""
        return len(self.members) * self.split

    def weights(self) -> tuple[float, ...] | None:
        """One weight per member for the mean; None for the base model alone.

        Raises:
            UsageError: `average` is neither mean nor base nor a usable weight for each.
        """
        if self.average == "base":
            return None
        if self.average == "mean":
            return (1.0,) * len(self.members)
        try:
            weights = tuple(float(word) for word in self.average.split(","))
        except ValueError:
            weights = ()
        good = len(weights) == len(self.members) and all(0 <= weight < 1e30 for weight in weights) and sum(weights) > 0
        if not good:
            raise UsageError(
                f"--average {shown(self.average)!r} is neither mean nor base nor {len(self.members)} weights.",
                "Every model has its weight in the mean, the seed's last.",
                "Give mean, base, or one number of at least 0 per model, such as 2,1,1.",
            )
        return weights

    def of_model(self, expert: Expert) -> SparseRecipe:
        """How one model's FFN becomes its part of the experts."""
        return SparseRecipe(
            experts=self.split,
            top_k=self.split,
            granularity=self.split,
            scale=self.scale,
            noise=self.noise if expert.noise is None else expert.noise,
            router_std=self.router_std,
            aux_loss_coef=self.aux_loss_coef,
            dtype=self.dtype,
            seed=self.seed,
            shard_bytes=self.shard_bytes,
        )

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value out of its range, or values that contradict each other.
        """
        if not self.experts:
            raise UsageError(
                "No EXPERT was given.", "There is nothing to mix.", "Name dense checkpoints, or a --recipe."
            )
        for option, value, choices in (
            ("--scale", self.scale, SCALES),
            ("--router-init", self.router_init, ROUTER_INITS),
            ("--router-tokens", self.router_tokens, ROUTER_TOKENS),
        ):
            if value not in choices:
                raise UsageError(f"{option} {shown(value)!r} is not known.", "", f"Give one of {', '.join(choices)}.")
        if not 1 <= self.split <= MAX_EXPERTS or self.num_experts > MAX_EXPERTS:
            raise UsageError(
                f"--split {shown(self.split)} of {len(self.members)} models is impossible.",
                f"It must be at least 1, and there can be {MAX_EXPERTS} experts at most.",
                "Give another number.",
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise UsageError(
                f"--top-k {shown(self.top_k)} of {self.num_experts} experts is impossible.",
                "Each token is sent to top-k different experts.",
                f"Give --top-k from 1 to {self.num_experts}.",
            )
        if self.scale == "auto" and self.top_k % self.split:
            raise UsageError(
                f"--top-k {self.top_k} is not a multiple of --split {self.split}.",
                "A token would get part of an FFN, and no scale makes that the FFN's output.",
                "Give such a multiple, or choose --scale updown, down, cbrt or none to mean it.",
            )
        for expert in (*self.members, *((self.shared_expert,) if self.shared_expert else ())):
            self.of_model(expert).check()
            _check_number("residual_scale", expert.residual_scale, low=-sys.float_info.max)
            if self.router_init != "random" and not (expert.prompts or expert.data):
                raise UsageError(
                    f"--router-init {self.router_init}: {shown(expert.model)} has no text.",
                    "Its router row is made of the texts it should get.",
                    "Give one --data per expert (the seed's last), or prompts or data in a recipe file.",
                )
        _check_number("--router-logit-std", self.router_logit_std, low=sys.float_info.min)
        self.weights()


def _check_number(name: str, value: float, low: float) -> None:
    if not low <= value <= sys.float_info.max:
        least = "above 0" if low > 0 else ""
        raise UsageError(
            f"{name} {shown(value)} is not a finite number {least}".rstrip() + ".", "", "Give another value."
        )
