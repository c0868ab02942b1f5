"""The words in which families are described: frozen data, read by every workflow, executed by none.

Tensor names are patterns over {layer} and {expert}; shapes are sums of symbols resolved from a config ("Q+2KV"):
V vocabulary, H hidden_size, F intermediate_size, Q = heads * head_dim, KV = key-value heads * head_dim, D head_dim,
E experts, a number, or the name of a config field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moectl.checkpoint.expressions import Copy, Expression, Slice

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, or one per layer if its name has {layer}; present when config[when] is true (or always).

    `kind` limits it to the layers config["layer_types"] calls so; `layers` is the config field that counts its layers.
    """

    name: str
    shape: tuple[str, ...]
    when: str | None = None
    kind: str | None = None
    layers: str = "num_hidden_layers"


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


@dataclass(frozen=True, slots=True)
class PlainMlp:
    """Names of an FFN without a gate, `down(act(up(x)))`, in a stack of config[layers] layers."""

    up: str
    down: str
    layers: str

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of a dense layer's FFN."""
        return (
            TensorSpec(self.up, ("F", "H"), layers=self.layers),
            TensorSpec(self.down, ("H", "F"), layers=self.layers),
        )


@dataclass(frozen=True)
class DenseFamily:
    """A dense family on disk: a decoder, or an encoder-decoder if it has an `encoder_mlp`.

    Attributes:
        names: for families with other words for sizes, `hidden_size` and its like -> the field of their config.
        mlp, encoder_mlp: the FFN, and that of the encoder's layers.
        optional: tensors that need not be there, and go along where they are.
        defaults: config values transformers assumes when config.json leaves them out.
        tensors: everything but the FFN.
        ignored: patterns of tensors old checkpoints carry and transformers drops on loading.
        derive: fields that follow from others, such as `layer_types`, as the family's config class computes them.
        rope_theta, partial_rotary_factor: what rotary parameters default to; None where the family rotates all of
            a head and its config has no say in it.
    """

    model_type: str
    architecture: str
    defaults: Config
    tensors: tuple[TensorSpec, ...]
    mlp: Mlp | PlainMlp
    ignored: tuple[str, ...] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
    derive: Callable[[Config], dict[str, Any]] = lambda _config: {}
    rope_theta: float = 10_000.0
    partial_rotary_factor: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    encoder_mlp: PlainMlp | None = None
    optional: tuple[TensorSpec, ...] = ()

    @property
    def mlp_tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of the FFNs of all its stacks."""
        return (*(self.encoder_mlp.tensors if self.encoder_mlp else ()), *self.mlp.tensors)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An always-active FFN beside the routed ones.

    Attributes:
        default: what it is unless asked for: "none" where it can be left out, "silent" where it must be there but may
            be narrow, "copy" of the dense FFN where it is as wide as an expert.
        gate_row: name of the row [1, H] whose sigmoid scales it, where the family has one.
    """

    mlp: Mlp
    default: Literal["none", "silent", "copy"]
    gate_row: str | None = None


@dataclass(frozen=True)
class MoeFamily:
    """A MoE family on disk.

    Attributes:
        router: name of the router weight [E, H].
        mlp: names of the experts' matrices: one of each per expert, or fused over all experts of a layer.
        fields: the config fields that carry num_experts, top_k, expert_width, and, where the family has them,
            norm_topk (renormalise the chosen weights), aux_loss (load-balancing coefficient), shared_width and
            shared_count (shared experts, each as wide as a routed one).
        fewest_experts: what its router needs to run.
        biases: float32 tensors a MoE layer has for balancing its experts, zero before training.
        values: config fields with a fixed value in every checkpoint written.
        dense_layers: the config field that lists the layers kept dense (under the dense family's names), if any.
        router_std: what router rows are drawn with unless told otherwise: 0 where only equal scores are exact, since
            chosen weights are not renormalised.
        encoder: router and experts of the encoder's layers, in an encoder-decoder.
    """

    model_type: str
    architecture: str
    router: str
    mlp: Mlp | PlainMlp
    fields: Mapping[str, str]
    values: Config = field(default_factory=dict)
    shared: SharedExpert | None = None
    dense_layers: str | None = None
    fewest_experts: int = 1
    biases: tuple[TensorSpec, ...] = ()
    router_std: float = 0.02
    encoder: tuple[str, PlainMlp] | None = None


Rewrite = Callable[[Expression, Config], Expression]


@dataclass(frozen=True)
class Pair:
    """How a dense family's config becomes a MoE family's, so that attention and norms compute the same.

    Attributes:
        keep: fields copied by name from the dense family's normalised config: a whitelist, nothing else goes along.
        translate: further fields computed from the normalised config.
        refuse: for each reason a dense config cannot be held, a function that returns the reason or None.
        rewrite: for a dense tensor outside the FFN that is renamed, cut or permuted, the MoE tensors it becomes;
            every other tensor goes along as it is.
    """

    dense: str
    moe: str
    keep: tuple[str, ...]
    translate: Callable[[Config], dict[str, Any]] = lambda _config: {}
    refuse: tuple[Callable[[Config], str | None], ...] = ()
    rewrite: Mapping[str, Mapping[str, Rewrite]] = field(default_factory=dict)

    def rewritten(self, layers: int, config: Config) -> dict[str, dict[str, Expression]]:
        """For each dense tensor that does not go along as it is, the MoE tensors made of it."""
        return {
            old.format(layer=layer): {
                new.format(layer=layer): rewrite(Copy(old.format(layer=layer)), config)
                for new, rewrite in parts.items()
            }
            for old, parts in self.rewrite.items()
            for layer in range(layers)
        }
