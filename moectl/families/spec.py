"""The words in which families are described: frozen data, read by every workflow, executed by none.

Tensor names are patterns over {layer} and {expert}; shapes are products of symbols resolved from a config:
V vocabulary, H hidden_size, F intermediate_size, Q = heads * head_dim, KV = key-value heads * head_dim, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, or one per layer if its name has {layer}; present when config[when] is true (or always)."""

    name: str
    shape: tuple[str, ...]
    when: str | None = None


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """Names of a gated FFN `down(act(gate(x)) * up(x))`: gate and up are [F, H], down is [H, F]."""

    gate: str
    up: str
    down: str


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
    mlp: GatedMlp
    ignored: tuple[str, ...] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An always-active FFN beside the routed ones, scaled by sigmoid(gate_row @ x); `width` is its config field."""

    mlp: GatedMlp
    gate_row: str
    width: str


@dataclass(frozen=True)
class MoeFamily:
    """A MoE family on disk, with one tensor per expert and matrix.

    Attributes:
        router: name of the router weight [E, H].
        mlp: names of an expert's matrices.
        fields: the config fields that carry num_experts, top_k, expert_width, and, where the family has them,
            norm_topk (renormalise the chosen weights) and aux_loss (load-balancing coefficient).
        values: config fields with a fixed value in every checkpoint written.
    """

    model_type: str
    architecture: str
    router: str
    mlp: GatedMlp
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
