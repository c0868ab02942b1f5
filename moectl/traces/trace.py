"""The RoutingTrace: for every MoE layer and token, the chosen experts, their weights and, on request, the scores.

Captured once, asked many questions: each metric is a pure function of it, in a file of its own beside this one.

Legend: T tokens, K experts per token, E experts, L points (MoE layers), N documents, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moectl.errors import InputError

NO_EXPERT = -1
"""In place of an expert's number where a token was sent nowhere: dropped over capacity, or below a threshold."""

PREFILL, DECODE = 0, 1
"""Values of `Tokens.phase_T`."""

ScoreKind = Literal["logits", "probabilities", "none"]


@dataclass(frozen=True, slots=True)
class Point:
    """One place that experts are dispatched from: a MoE layer of one part of a model.

    Attributes:
        name: of the module, as `model.layers.3.mlp.experts`.
        layer: its number in its part, counted as the model counts its layers, dense ones too.
        role: `decoder`, `encoder`, `attention` (experts of projections) or `mtp` (multi-token prediction).
        num_experts: routed experts, with those that compute nothing.
        top_k: the most experts a token is sent to.
        null_experts: how many of the last numbers are identity, zero or skip experts.
        score_kind: what the router's scores are: logits, probabilities, or none where no score decides (hashing).
        scoring: `softmax` or `sigmoid`, what makes probabilities of logits.
        selects: True if the top-k of the scores alone is the choice; False with biases, groups or tables in between.
    """

    name: str
    layer: int
    num_experts: int
    top_k: int
    role: str = "decoder"
    null_experts: int = 0
    score_kind: ScoreKind = "none"
    scoring: str = "softmax"
    selects: bool = True

    @property
    def label(self) -> str:
        """How tables and pictures call it: the layer's number, with the part in front where that is no decoder."""
        return str(self.layer) if self.role == "decoder" else f"{self.role} {self.layer}"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a trace, in the order in which they were read: document after document.

    Attributes:
        token_T: token ids, int32; all -1 where the source of the trace had none.
        document_T: which document each belongs to, int32, from 0, never falling.
        position_T: its place in the document, int32.
        phase_T: PREFILL or DECODE, uint8.
        domain_N: for every document the number of its domain, int32.
        domains: their names.
        predicted_T: the token that the model gave the highest logit after each, int32; None if not recorded.
    """

    token_T: np.ndarray
    document_T: np.ndarray
    position_T: np.ndarray
    phase_T: np.ndarray
    domain_N: np.ndarray
    domains: tuple[str, ...]
    predicted_T: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_T)

    @property
    def domain_T(self) -> np.ndarray:
        """The domain of each token [T]."""
        return np.asarray(self.domain_N[self.document_T])

    @property
    def follows_T(self) -> np.ndarray:
        """Whether each token comes directly after the one before it, in the same document [T]."""
        follows = np.zeros(len(self), bool)
        known = self.position_T[:-1] >= 0
        follows[1:] = (np.diff(self.document_T) == 0) & (np.diff(self.position_T) == 1) & known
        return follows

    def where(self, mask_T: np.ndarray) -> Tokens:
        """Those that a mask keeps; documents keep their numbers."""
        predicted = None if self.predicted_T is None else self.predicted_T[mask_T]
        return replace(
            self,
            token_T=self.token_T[mask_T],
            document_T=self.document_T[mask_T],
            position_T=self.position_T[mask_T],
            phase_T=self.phase_T[mask_T],
            predicted_T=predicted,
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """What happened at one point.

    Attributes:
        point: which.
        index_TK: the experts in the order of the router's preference, int16; NO_EXPERT where there is none.
        weight_TK: what their outputs were multiplied with, float16; None if not recorded.
        score_TE: the router's scores, float16, of `point.score_kind`; None if not recorded.
    """

    point: Point
    index_TK: np.ndarray
    weight_TK: np.ndarray | None = None
    score_TE: np.ndarray | None = None

    def where(self, mask_T: np.ndarray) -> Routed:
        """The tokens that a mask keeps."""
        weight = None if self.weight_TK is None else self.weight_TK[mask_T]
        score = None if self.score_TE is None else self.score_TE[mask_T]
        return Routed(self.point, self.index_TK[mask_T], weight, score)


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Who went where, at every point, for the same tokens. An encoder and a decoder have a trace each.

    Attributes:
        tokens: all of them.
        layers: what happened at each point, in the order of the layers.
        about: where the trace comes from (model, data, engine), for the report; plain data.
    """

    tokens: Tokens
    layers: tuple[Routed, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for routed in self.layers:
            point, index_TK = routed.point, routed.index_TK
            if index_TK.shape != (len(self.tokens), point.top_k):
                raise InputError(
                    f"The trace of {point.name} has the shape {index_TK.shape}, and there are {len(self.tokens)} "
                    f"tokens of {point.top_k} experts each.",
                    "A row of it is a token.",
                    "Capture it again.",
                )
            if index_TK.size and not NO_EXPERT <= index_TK.min() <= index_TK.max() < point.num_experts:
                raise InputError(
                    f"The trace of {point.name} names expert {index_TK.max()}, of {point.num_experts}.",
                    "It is damaged, or the number of experts is not what its description says.",
                    "Capture it again, or correct the number.",
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, mask_T: np.ndarray) -> RoutingTrace:
        """The tokens that a mask [T] keeps."""
        return replace(
            self, tokens=self.tokens.where(mask_T), layers=tuple(routed.where(mask_T) for routed in self.layers)
        )
