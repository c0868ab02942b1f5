"""What became of a model that was compressed, as data: from the reports of its layers, its plan, and what was measured.

Legend: E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moectl.codecs.rate import Rate
from moectl.compress.pipeline.report import LayerReport, MatrixReport

CODES, LEVELS, COUNTS, EMBEDDINGS, REST = "codes", "levels", "counts", "embeddings", "rest"
STORED: dict[str, str] = {
    CODES: "experts: codes",
    LEVELS: "experts: levels or scales",
    COUNTS: "experts: counts of codewords",
    EMBEDDINGS: "embedding and head",
    REST: "attention, routers, norms and other dense weights",
}
"""What bytes of an output can be for, and what that is called."""

_PARTS = {
    "codes": CODES,
    "packed": CODES,
    "weight_packed": CODES,
    "levels": LEVELS,
    "scales": LEVELS,
    "zeros": LEVELS,
    "weight_scale": LEVELS,
    "counts": COUNTS,
    "about": COUNTS,
}
_EMBEDDINGS = ("embed_tokens", "lm_head", "shared", "wte", "word_embeddings", "embeddings", "embed_out", "output_layer")
_EXPERT = re.compile(r"(^|\.)experts?[._]\d")
"""In the names of an exported expert, which are those on disk."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of one layer, its matrices together: means are over weights.

    Attributes:
        tokens: that were routed to it.
        zeros: share of weights that became zero.
        error: of its outputs on calibration tokens, relative to their energy; of its weights where it is cold.
        bits: per weight, levels and scales counted.
        cold: it was given too few tokens, and was rounded to nearest.
        fallback: a Hessian could not be factored, and that matrix was rounded to nearest.
        thin: it was looked at on fewer tokens than it has inputs.
    """

    tokens: int
    zeros: float
    error: float
    bits: float
    cold: bool
    fallback: bool
    thin: bool


@dataclass(frozen=True)
class Layer:
    """One layer that has experts.

    Attributes:
        label: how a person tells it from others, such as `3` or `encoder 3`.
        name: in the model.
        experts: in the order of their numbers.
        seconds: it took.
        rerouted: share of held-out tokens that take other experts than before; None where that was not measured.
    """

    label: str
    name: str
    experts: tuple[Expert, ...]
    seconds: float
    rerouted: float | None = None

    @property
    def tokens(self) -> tuple[int, float, int]:
        """Of the expert that was given fewest, on average, and of the one that was given most."""
        counts = [expert.tokens for expert in self.experts]
        return min(counts), sum(counts) / len(counts), max(counts)

    @property
    def cold(self) -> int:
        """How many experts were rounded to nearest."""
        return sum(expert.cold for expert in self.experts)

    def mean(self, measure: str) -> float:
        """The mean over experts of `zeros`, `error` or `bits`."""
        return sum(getattr(expert, measure) for expert in self.experts) / len(self.experts)

    def to_json(self) -> dict[str, Any]:
        """What does not depend on the machine."""
        fewest, mean, most = self.tokens
        return {
            "layer": self.label,
            "name": self.name,
            "tokens": {"min": fewest, "mean": mean, "max": most},
            "cold": self.cold,
            **{measure: self.mean(measure) for measure in ("zeros", "error", "bits")},
            "experts": [asdict(expert) for expert in self.experts],
        }


@dataclass(frozen=True)
class Summary:
    """A whole model.

    Attributes:
        name: of the model it was made from.
        recipe: what was asked for.
        facts: of the plan: parameters, bytes, bits, ratio.
        layers: those with experts, in order.
        stored: bytes for each of `STORED`.
        rate: of ternary weights; None for a uniform grid. Signs count as equally likely in its entropy.
        measured: as `Change.to_json` of the evaluation has it; None if it was not.
        about: of the calibration: data, samples, tokens.
        seconds: of all layers, or of the whole command.
        peak_bytes: of resident memory, None where unknown.
    """

    name: str
    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    layers: tuple[Layer, ...]
    stored: Mapping[str, int]
    rate: Rate | None = None
    measured: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int | None = None

    @property
    def domains(self) -> Mapping[str, Mapping[str, Any]]:
        """What was measured on each domain and, as `mean`, on average; empty if nothing was."""
        return (self.measured or {}).get("domains", {})

    @property
    def method(self) -> str:
        """How experts were quantised, in a word or two."""
        if self.rate is not None:
            return "the paper's ternary weights" if self.recipe.get("compat") else "ternary weights"
        return f"{self.recipe['bits']:g}-bit grids"


def summary(
    name: str,
    reports: Sequence[LayerReport],
    facts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    sizes: Mapping[str, int],
    experts: Collection[str],
    *,
    measured: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    peak_bytes: int | None = None,
) -> Summary:
    """Put together what is known.

    Args:
        name: of the model that was compressed.
        reports: of its layers.
        facts: of the plan of the output.
        recipe: what was asked for.
        sizes: bytes of every tensor of the output, by name.
        experts: the parameters, by their names in memory, that are experts' and were coded.
        measured: `Change.to_json()` of the evaluation.
        about: the calibration.
        seconds: of the whole command; that of all layers when left out.
        peak_bytes: of resident memory.
    """
    stored = stored_for(sizes, experts)
    return Summary(
        name,
        recipe,
        facts,
        layers(reports, (measured or {}).get("rerouted", {})),
        stored,
        _rate(reports, stored) if any(tensor.endswith(".codes") for tensor in sizes) else None,
        measured,
        about or {},
        sum(report.seconds for report in reports) if seconds is None else seconds,
        peak_bytes,
    )


def layers(reports: Sequence[LayerReport], rerouted: Mapping[str, float] | None = None) -> tuple[Layer, ...]:
    """The layers that have experts.

    Args:
        reports: of all layers.
        rerouted: by the name of a module within a layer.
    """
    found = rerouted or {}
    withs = [report for report in reports if report.matrices]
    prefixes = {report.name.rpartition(".")[0] for report in withs}
    return tuple(
        Layer(
            _label(report, several=len(prefixes) > 1),
            report.name,
            tuple(_experts(report.matrices)),
            report.seconds,
            next((share for module, share in found.items() if module.startswith(f"{report.name}.")), None),
        )
        for report in withs
    )


def stored_for(sizes: Mapping[str, int], experts: Collection[str]) -> dict[str, int]:
    """Bytes for each of `STORED` that takes any."""
    found = dict.fromkeys(STORED, 0)
    for name, nbytes in sizes.items():
        owner, _, part = name.rpartition(".")
        words = name.split(".")
        if owner in experts or (part in _PARTS and _EXPERT.search(name)):
            found[_PARTS.get(part, CODES)] += nbytes
        else:
            found[EMBEDDINGS if any(word in _EMBEDDINGS for word in words) else REST] += nbytes
    return {purpose: nbytes for purpose, nbytes in found.items() if nbytes}


def _rate(reports: Sequence[LayerReport], stored: Mapping[str, int]) -> Rate:
    matrices = [matrix for report in reports for matrix in report.matrices]
    return Rate(
        sum(matrix.rows * matrix.columns for matrix in matrices),
        sum(matrix.rows * matrix.columns * _entropy(matrix.sparsity) for matrix in matrices),
        8 * stored.get(CODES, 0),
        8 * (stored.get(LEVELS, 0) + stored.get(COUNTS, 0)),
    )


def _entropy(zeros: float) -> float:
    """Bits of a weight that is zero with such a probability, and else + or - alike."""
    return sum(share * math.log2(1 / share) for share in (zeros, (1 - zeros) / 2, (1 - zeros) / 2) if share > 0)


def _experts(matrices: Sequence[MatrixReport]) -> Iterator[Expert]:
    of_expert: dict[int, list[MatrixReport]] = {}
    for matrix in matrices:
        of_expert.setdefault(matrix.expert, []).append(matrix)
    for number in sorted(of_expert):
        own = of_expert[number]
        weights = [matrix.rows * matrix.columns for matrix in own]

        def mean(measure: str, own: list[MatrixReport] = own, weights: list[int] = weights) -> float:
            each = zip(own, weights, strict=True)
            return sum(getattr(matrix, measure) * weight for matrix, weight in each) / sum(weights)

        yield Expert(
            max(matrix.tokens for matrix in own),
            mean("sparsity"),
            mean("error"),
            mean("bits"),
            any(matrix.cold for matrix in own),
            any(matrix.fallback for matrix in own),
            any(matrix.looked_at < matrix.columns for matrix in own),
        )


def _label(report: LayerReport, *, several: bool) -> str:
    number = report.name if report.index is None else str(report.index)
    part = next((word for word in report.name.split(".") if word in ("encoder", "decoder")), "")
    if several and part and report.index is not None:
        return f"{part} {report.name.rpartition('.')[2]}"  # its index counts both stacks
    return number
