"""What each domain would lose without some experts, and what skipping weak choices would save.

An estimate: what the routing says. The least used experts are removed, by what their outputs are multiplied with, and
nothing takes their place. Skipping is NAEE's (arXiv 2402.14800): a second expert does not run if its weight is below
beta times the first one's, where beta is the median of that ratio in the layer (checked in Lucky-Lance/Expert_Sparsity,
method/dynamic_skipping.py); here every choice after the first is skipped so, and of two experts it is the same.
Legend: T tokens, K choices, E experts, D domains, R numbers of removed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.whatif.asked import computing, mean, require, require_numbers, weights, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.text import shown
from moectl.traces.trace import Routed, RoutingTrace

SHARES = tuple(step / 16 for step in range(17))
"""Of the experts, for the curve."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        removed: share of the experts of each layer, the least used ones.
        by: what is used: `weight` (the sum of what outputs are multiplied with, if it is recorded) or `count`.
        beta: of skipping; 0: the median of each layer.
    """

    removed: float = 0.25
    by: str = "weight"
    beta: float = 0.0

    def __post_init__(self) -> None:
        require_numbers(self, "removed", "beta")
        if self.removed >= 1:
            raise UsageError(f"removed cannot be {self.removed:g}: that is all experts.", "", "Give removed=0.25, say.")
        if self.by not in ("weight", "count"):
            raise UsageError(f"Experts cannot be ranked by {shown(self.by)!r}.", "", "Give weight or count.")


def mass(routed: Routed, domain_T: np.ndarray, domains: int, by: str) -> np.ndarray:
    """What each domain sends to each expert: combine weights, or assignments [D, E]."""
    index_TK, experts = computing(routed)
    weight_TK = weights(routed) if by == "weight" and routed.weight_TK is not None else np.ones(index_TK.shape)
    there_TK = index_TK >= 0
    flat_S = (domain_T[:, None] * experts + index_TK)[there_TK]
    return np.bincount(flat_S, weight_TK[there_TK], domains * experts).reshape(domains, experts)


def least_used(mass_E: np.ndarray, number: int) -> np.ndarray:
    """The experts with the least, the lower number first of equals."""
    return np.argsort(mass_E, kind="stable")[:number]


def run(trace: RoutingTrace, options: Options) -> Finding:
    """What is lost without the least used experts, by domain, and what is skipped.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    require(trace, "pruning")
    domain_T, names = trace.tokens.domain_T, trace.tokens.domains
    there_D = np.bincount(domain_T, minlength=len(names)) > 0
    rows: list[tuple[Cell, ...]] = []
    lost_LD, curves, kept_LDD, cross_LDD, losing, skips, masks = [], [], [], [], [], [], []
    for routed in trace.layers:
        index_TK, experts = computing(routed)
        number = round(options.removed * experts)
        mass_DE = mass(routed, domain_T, len(names), options.by)
        gone = least_used(mass_DE.sum(0), number)
        lost_D = _lost(mass_DE, gone)
        lost_LD.append(np.where(there_D, lost_D, np.nan))
        losing.append(_losing(index_TK, gone, experts))
        kept_DD, cross_DD = _across(mass_DE, number)
        kept_LDD.append(kept_DD)
        cross_LDD.append(cross_DD)
        skips.append(_skipped(routed, domain_T, len(names), options.beta))
        masks += [f"{routed.point.label}:{expert}" for expert in sorted(gone.tolist())]
        curves.append(_line(mass_DE, there_D))
        worst = int(np.nanargmax(lost_LD[-1]))
        lost = float(mass_DE[:, gone].sum() / max(mass_DE.sum(), 1e-300))
        skipped, skipped_mass = (None, None) if skips[-1] is None else skips[-1][:2]
        rows.append(
            (
                *(routed.point.label, number, lost, number / experts, float(lost_D[worst]), names[worst]),
                *(float(losing[-1][1:].sum()), float(losing[-1][-1]), skipped, skipped_mass),
            )
        )
    columns = (
        *("layer", "removed", "mass lost", "random experts", "worst domain's", "worst domain", "tokens losing some"),
        *("tokens losing all", "choices skipped", "their weight"),
    )
    domains = _domains(names, there_D, np.array(lost_LD), skips)
    overlap, crossed = (_matrix(each, names, there_D) for each in (kept_LDD, cross_LDD))
    return Finding(
        "pruning",
        _headline(with_mean(rows)[-1], domains, options, all(each.weight_TK is not None for each in trace.layers)),
        columns,
        (*with_mean(rows), *_domain_rows(domains)),
        (_curve(curves),),
        _assumptions(trace, options, len(names)),
        {
            "domains": domains,
            "kept by both": overlap,
            "lost in the column, kept for the row": crossed,
            "tokens losing 0, 1, ...": {row[0]: each.tolist() for row, each in zip(rows, losing, strict=True)},
            "beta": {row[0]: None if each is None else each[2] for row, each in zip(rows, skips, strict=True)},
            "mask": ",".join(masks),
        },
    )


def _lost(mass_DE: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Share of each domain's mass [D]."""
    return np.asarray(mass_DE[:, gone].sum(1) / mass_DE.sum(1).clip(1e-300))


def _losing(index_TK: np.ndarray, gone: np.ndarray, experts: int) -> np.ndarray:
    """Share of the tokens that lose 0, 1, ... of their experts, and at the end all of them [K + 2]."""
    gone_E = np.zeros(experts + 1, bool)  # at its end what NO_EXPERT finds
    gone_E[gone] = True
    lost_T, had_T = gone_E[index_TK].sum(1), (index_TK >= 0).sum(1)
    all_T = (lost_T == had_T) & (had_T > 0)
    lost_T[all_T] = index_TK.shape[1] + 1
    return np.bincount(lost_T, minlength=index_TK.shape[1] + 2) / max(len(index_TK), 1)


def _across(mass_DE: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """What share of the experts is kept for both domains [D, D], and what the second loses with the first's [D, D]."""
    experts = mass_DE.shape[1]
    gone = [least_used(mass_E, number) for mass_E in mass_DE]
    kept_DE = np.ones(mass_DE.shape)
    for domain, each in enumerate(gone):
        kept_DE[domain, each] = 0
    return kept_DE @ kept_DE.T / max(experts - number, 1), np.array([_lost(mass_DE, each) for each in gone])


def _skipped(
    routed: Routed, domain_T: np.ndarray, domains: int, beta: float
) -> tuple[float, float, float, np.ndarray] | None:
    """Of the choices how many are skipped, their share of the weights, beta, and the first for each domain [D].

    None where a token has one choice, or weights are not recorded.
    """
    if routed.weight_TK is None or routed.point.top_k < 2:
        return None
    weight_TK = -np.sort(-weights(routed), axis=1)
    later_TK = weight_TK[:, 1:] / weight_TK[:, :1].clip(1e-30)
    there_TK = later_TK > 0
    if not there_TK.any():
        return None
    beta = beta or float(np.median(later_TK[there_TK]))
    skip_TK = there_TK & (later_TK < beta)
    skip_D, chosen_D = (np.bincount(domain_T, value_TK.sum(1), domains) for value_TK in (skip_TK, weight_TK > 0))
    by_weight = float(weight_TK[:, 1:][skip_TK].sum() / weight_TK.sum())
    return float(skip_D.sum() / chosen_D.sum()), by_weight, beta, skip_D / chosen_D.clip(1)


def _line(mass_DE: np.ndarray, there_D: np.ndarray) -> list[tuple[float, float, float, float | None]]:
    """By share removed: what all domains lose, with random experts, in the worst domain, with another one's."""
    found = []
    experts, domains = mass_DE.shape[1], int(there_D.sum())
    for share in SHARES:
        number = round(share * experts)
        gone = least_used(mass_DE.sum(0), number)
        crossed_DD = _across(mass_DE[there_D], number)[1]
        other = float(crossed_DD[~np.eye(domains, dtype=bool)].mean()) if domains > 1 else None
        all_ = float(mass_DE[:, gone].sum() / max(mass_DE.sum(), 1e-300))
        found.append((all_, number / experts, float(_lost(mass_DE[there_D], gone).max()), other))
    return found


def _curve(curves: list[list[tuple[float, float, float, float | None]]]) -> Curve:
    least, random, worst, other = (
        [mean([layer[at][line] for layer in curves]) for at in range(len(SHARES))] for line in range(4)
    )
    lines: dict[str, Sequence[float | None]] = {"least used experts": least, "random experts": random}
    if other[0] is not None:
        lines |= {"least used, worst domain": worst, "least used of another domain": other}
    return Curve(
        "What the routing loses", "share of the experts removed", "share lost", SHARES, lines,
        chance="random experts", bound="least used experts", percent=True,
    )  # fmt: skip


def _domains(names: Sequence[str], there_D: np.ndarray, lost_LD: np.ndarray, skips: list[Any]) -> dict[str, Any]:
    skip_D = [each[3] for each in skips if each is not None]
    return {
        name: {
            "lost": float(lost_LD[:, domain].mean()),
            "skipped": float(np.mean([each[domain] for each in skip_D])) if skip_D else None,
        }
        for domain, name in enumerate(names)
        if there_D[domain]
    }


def _domain_rows(domains: Mapping[str, Mapping[str, Any]]) -> list[tuple[Cell, ...]]:
    return [
        (f"domain {shown(name, 40)}", None, each["lost"], *[None] * 5, each["skipped"], None)
        for name, each in domains.items()
        if len(domains) > 1
    ]


def _matrix(of_LDD: list[np.ndarray], names: Sequence[str], there_D: np.ndarray) -> dict[str, dict[str, float]]:
    mean_DD, there = np.mean(of_LDD, axis=0), np.flatnonzero(there_D).tolist()
    return {names[i]: {names[j]: float(mean_DD[i, j]) for j in there} for i in there}


def _headline(total: tuple[Cell, ...], domains: Mapping[str, Any], options: Options, weighed: bool) -> str:
    what = "combine weights" if options.by == "weight" and weighed else "assignments"
    text = (
        f"Without the least used {total[3]:.0%} of the experts, {total[2]:.1%} of the {what} are lost (random "
        f"experts: {total[3]:.1%}), and {total[7]:.1%} of the tokens lose every expert"
    )
    if len(domains) > 1:
        worst = max(domains, key=lambda name: domains[name]["lost"])
        text += f"; {shown(worst, 40)} loses most, {domains[worst]['lost']:.1%}"
    text += ". It is an estimate: seldom used is not unimportant"
    if total[8] is not None:
        text += (
            f". Skipping weak choices after the first (NAEE) saves {total[8]:.1%} of all choices, which have "
            f"{total[9]:.1%} of the combine weight"
        )
    return text + "."


def _assumptions(trace: RoutingTrace, options: Options, domains: int) -> tuple[str, ...]:
    said = [
        (
            "What is lost is not replaced: a model that is pruned chooses again among the rest, and its loss need not "
            "follow what the routing loses: `moectl analyze-routing MODEL --mask` and the experts in `mask` tell."
        ),
        (
            "How often an expert is used is not how much it does: the sizes of its outputs are not in a trace "
            "(`moectl compress prune` measures them)."
        ),
        "Chance: a random choice of as many experts loses their share.",
        "NAEE (arXiv 2402.14800) reports 1.20x speed and 2.9 points less on its tasks with 6 of 8 experts of Mixtral.",
    ]
    if not options.beta:
        said.append("With the median for beta, half of the choices after the first are skipped, but for ties.")
    if domains > 1:
        said.append(
            "Two domains that ranked experts independently would keep the same ones at the share that is kept "
            f"({1 - options.removed:.0%})."
        )
    if options.by == "weight" and any(routed.weight_TK is None for routed in trace.layers):
        said.append("Without weights in the trace every choice counts as much as any other.")
    return tuple(said)
