"""The words in which families are described: frozen data, read by every workflow, executed by none.

Tensor names are patterns over {layer} and {expert}; shapes are products of symbols resolved from a config:
V vocabulary, H hidden_size, F intermediate_size, Q = heads * head_dim, KV = key-value heads * head_dim, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moectl.checkpoint.expressions import Copy, Expression, Slice

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, or one per layer if its name has {layer}; present when config[when] is true (or always)."""

    name: str
    shape: tuple[str, ...]
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Ffn:
    """A gated FFN `down(act(gate(x)) * up(x))` as expressions: gate and up are [F, H], down is [H, F]."""

    gate: Expression
    up: Expression
    down: Expression

    @property
    def parts(self) -> tuple[Expression, Expression, Expression]:
        """Gate, up, down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """Names of a gated FFN stored as three matrices."""

    gate: str
    up: str
    down: str

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of a dense layer's FFN."""
        return TensorSpec(self.gate, ("F", "H")), TensorSpec(self.up, ("F", "H")), TensorSpec(self.down, ("H", "F"))

    def ffn(self, layer: int, width: int) -> Ffn:
        """A dense layer's FFN of intermediate size `width`."""
        gate, up, down = (Copy(name.format(layer=layer)) for name in (self.gate, self.up, self.down))
        return Ffn(gate, up, down)


@dataclass(frozen=True, slots=True)
class FusedMlp:
    """Names of a gated FFN stored as two matrices: gate above up [2F, H] (for experts [E, 2F, H]), and down."""

    gate_up: str
    down: str

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of a dense layer's FFN."""
        return TensorSpec(self.gate_up, ("2F", "H")), TensorSpec(self.down, ("H", "F"))

    def ffn(self, layer: int, width: int) -> Ffn:
        """A dense layer's FFN of intermediate size `width`."""
        gate_up, down = Copy(self.gate_up.format(layer=layer)), Copy(self.down.format(layer=layer))
        return Ffn(Slice(gate_up, 0, 0, width), Slice(gate_up, 0, width, 2 * width), down)


Mlp = GatedMlp | FusedMlp


@dataclass(frozen=True)
class DenseFamily:
    """A dense decoder family on disk.

    Attributes:
        defaults: config values transformers assumes when config.json leaves them out.
        tensors: everything but the FFN.
        ignored: patterns of tensors old checkpoints carry and transformers drops on loading.
    """

    model_type: str
    architecture: str
    defaults: Config
    tensors: tuple[TensorSpec, ...]
    mlp: Mlp
    ignored: tuple[str, ...] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An always-active FFN beside the routed ones.

    Attributes:
        width: its config field.
        gate_row: name of the row [1, H] whose sigmoid scales it, where the family has one.
    """

    mlp: Mlp
    width: str
    gate_row: str | None = None


@dataclass(frozen=True)
class MoeFamily:
    """A MoE family on disk, with one tensor per expert and matrix.

    Attributes:
        router: name of the router weight [E, H].
        mlp: names of the experts' matrices: one of each per expert, or fused over all experts of a layer.
        fields: the config fields that carry num_experts, top_k, expert_width, and, where the family has them,
            norm_topk (renormalise the chosen weights) and aux_loss (load-balancing coefficient).
        values: config fields with a fixed value in every checkpoint written.
    """

    model_type: str
    architecture: str
    router: str
    mlp: Mlp
    fields: Mapping[str, str]
    values: Config = field(default_factory=dict)
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class Pair:
    """How a dense family's config becomes a MoE family's, so that attention and norms compute the same.

    Attributes:
        keep: fields copied by name from the dense family's normalised config: a whitelist, nothing else goes along.
        translate: further fields computed from the normalised config.
        refuse: for each reason a dense config cannot be held, a function that returns the reason or None.
    """

    dense: str
    moe: str
    keep: tuple[str, ...]
    translate: Callable[[Config], dict[str, Any]] = lambda _config: {}
    refuse: tuple[Callable[[Config], str | None], ...] = ()
