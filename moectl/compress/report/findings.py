"""What a person should know of a compressed model before using it, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from moectl.compress.report.summary import CODES, COUNTS, EMBEDDINGS, LEVELS, REST, Summary

MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Limits:
    """Where words change.

    Attributes:
        loss: a rise of a domain's loss, as a share of it. QMoE's largest model lost 6.7 % (arXiv 2310.16795, table 3).
        other_domains: how many times what the others lose, at the median, a domain loses much.
        rerouted: a share of tokens. At 1.5 bits 41 % were seen to change experts (GEMQ).
        error: of a layer, in multiples of the median layer's.
        rows: levels and counts, as a share of the experts' bits.
        dense: what is not experts', as a share of all bits.
    """

    loss: float = 0.10
    other_domains: float = 2.0
    rerouted: float = 0.40
    error: float = 2.0
    rows: float = 0.15
    dense: float = 0.5


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that stands out: what, and what it means; `serious` if the model may be worse than it looks."""

    what: str
    meaning: str
    serious: bool = True


def findings(summary: Summary) -> list[Finding]:
    """What stands out, what is serious first."""
    found = [*_lost(summary), *_experts(summary), *_rerouted(summary), *_errors(summary), *_sizes(summary)]
    return sorted(found, key=lambda finding: not finding.serious)


def _lost(summary: Summary) -> Iterator[Finding]:
    rises = {
        domain: each["after"]["loss"] / each["before"]["loss"] - 1
        for domain, each in summary.domains.items()
        if domain != MEAN and each["before"]["loss"] > 0
    }
    if not rises:
        if summary.measured is None:
            yield Finding("Quality was not measured", "How much worse the model has become is not known from here.")
        return
    worst = max(rises, key=lambda domain: rises[domain])
    typical = median(rises.values())
    if rises[worst] > LIMITS.loss:
        yield Finding(
            f"{worst} lost much: its loss rose by {rises[worst]:.0%}",
            "Calibrate on such text (--data), give experts more bits, or leave the dense part alone (--dense bf16).",
        )
    elif len(rises) > 2 and rises[worst] > LIMITS.other_domains * max(typical, 0.01):
        yield Finding(
            f"{worst} lost more than other text: {rises[worst]:.1%}, {typical:.1%} at the median",
            "It may be rare in what the experts were calibrated on.",
        )


def _experts(summary: Summary) -> Iterator[Finding]:
    experts = [expert for layer in summary.layers for expert in layer.experts]
    total = len(experts)
    if cold := sum(expert.cold for expert in experts):
        where = sum(bool(layer.cold) for layer in summary.layers)
        yield Finding(
            f"{cold} of {total} experts, in {_layers(where)}, were given too few tokens and rounded to nearest",
            "Text that needs them will suffer more than the loss says. More --samples, other --data or --all-experts "
            "reach them.",
        )
    if fallback := sum(expert.fallback for expert in experts):
        yield Finding(
            f"The Hessians of {fallback} of {total} experts could not be factored",
            "Those were rounded to nearest. Inputs that are all alike, or far from normal, do this.",
        )
    if thin := sum(expert.thin and not expert.cold for expert in experts):
        yield Finding(
            f"{thin} of {total} experts were calibrated on fewer tokens than they have inputs",
            "What they do in the other directions was left to damping. More --samples would fit them better.",
            serious=thin > total // 2,
        )


def _rerouted(summary: Summary) -> Iterator[Finding]:
    known = [layer for layer in summary.layers if layer.rerouted is not None]
    if not known:
        return
    most = max(known, key=lambda layer: layer.rerouted or 0.0)
    if (most.rerouted or 0.0) > LIMITS.rerouted:
        yield Finding(
            f"{most.rerouted:.0%} of the tokens take other experts than before in layer {most.label}",
            "Routers decide on hidden states that have changed, and experts are given tokens they were not fitted to.",
        )


def _errors(summary: Summary) -> Iterator[Finding]:
    if len(summary.layers) < 3:
        return
    errors = [layer.mean("error") for layer in summary.layers]
    typical, worst = median(errors), max(summary.layers, key=lambda layer: layer.mean("error"))
    if typical > 0 and worst.mean("error") > LIMITS.error * typical:
        yield Finding(
            f"Layer {worst.label} has {worst.mean('error') / typical:.1f} times the error of the median layer",
            "A layer like that can decide what the whole model lost.",
            serious=False,
        )


def _sizes(summary: Summary) -> Iterator[Finding]:
    stored = summary.stored
    of_experts = sum(stored.get(part, 0) for part in (CODES, LEVELS, COUNTS))
    rest = stored.get(REST, 0) + stored.get(EMBEDDINGS, 0)
    if rest > LIMITS.dense * (rest + of_experts):
        fix = "--dense int8 or int4 makes that smaller." if summary.recipe.get("dense") == "bf16" else ""
        yield Finding(
            f"{rest / (rest + of_experts):.0%} of the bytes are not experts'",
            f"Fewer bits for experts hardly make the model smaller. {fix}".strip(),
            serious=False,
        )
    rows = stored.get(LEVELS, 0) + stored.get(COUNTS, 0)
    if summary.rate is not None and rows > LIMITS.rows * of_experts:
        yield Finding(
            f"{rows / of_experts:.0%} of the experts' bytes are what each row takes besides its codes",
            "Rows are narrow: below widths of about a thousand ternary weights cost more than their entropy.",
            serious=False,
        )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
