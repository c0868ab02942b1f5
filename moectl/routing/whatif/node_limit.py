"""What a limit of nodes per token would change: DeepSeek's device- and node-limited routing on captured scores.

A node's score is the sum of its two highest (V3, arXiv 2412.19437, 2.1.2, with biases that a trace has not), or its
highest (V2, arXiv 2405.04434, 2.2.2); the best nodes are kept, and the token chooses again among their experts.
Legend: T tokens, K choices, E experts, N nodes, M limits, p probabilities, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routing.whatif.asked import chunks, computing, homes, mean, require, require_numbers, with_mean
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.limiting import Limited, limited
from moectl.text import shown
from moectl.traces.trace import Routed, RoutingTrace

BEST_OF = {"v3": 2, "v2": 1}


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked.

    Attributes:
        nodes: groups of neighbouring experts.
        limit: nodes that a token may go to; 0: half of them, or as many as a token's experts need.
        rule: `v3` (sum of a node's two highest scores) or `v2` (its highest).
        seed: of the random routing to compare with.
    """

    nodes: int = 8
    limit: int = 0
    rule: str = "v3"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in BEST_OF:
            raise UsageError(f"There is no rule {shown(self.rule)!r}.", "", "Give v3 or v2.")
        require_numbers(self, "limit")
        if self.limit > self.nodes:
            raise UsageError(
                f"limit={self.limit} is more than the {self.nodes} nodes.", "", f"Give limit={self.nodes} or less."
            )


def run(trace: RoutingTrace, options: Options) -> Finding:
    """Choices changed, scores lost and nodes met, at the limit that is asked for and at all others.

    Raises:
        InputError: there are no scores.
        UsageError: there are more nodes than experts, or the nodes of the limit have too few experts.
    """
    require(trace, "node-limit", "scores")
    options = replace(options, limit=options.limit or _half(trace, options))
    rows: list[tuple[Cell, ...]] = []
    lines, domains = [], np.zeros((len(trace.tokens.domains), 3))
    agreed = recorded = 0
    for routed in trace.layers:
        node_E, least = _nodes(routed, options)
        at, p_TE = next(chunks(routed))
        dealt_TE = np.random.default_rng(options.seed).permuted(p_TE, axis=1)
        by_luck = limited(dealt_TE, routed.index_TK[at], node_E, BEST_OF[options.rule])
        of_domains = _layer(routed, node_E, trace, options)
        total = sum(of_domains[1:], of_domains[0])
        asked = options.limit - 1
        agreed, recorded = agreed + total.agreed, recorded + total.recorded
        measured, chance = (_shares(each, routed.point.top_k, least) for each in (total, by_luck))
        (changed, lost, nodes), (changed_c, _, nodes_c) = measured[asked], chance[asked]
        free = measured[-1][2]
        rows.append((routed.point.label, changed, changed_c, lost, nodes, nodes_c, free, chance[-1][2]))
        lines.append([(*one, *other) for one, other in zip(measured, chance, strict=True)])
        for number, each in enumerate(of_domains):
            domains[number] += each.tokens, each.changed_M[asked] / routed.point.top_k, each.nodes_M[asked]
    columns = (
        *("layer", "choices changed", "by chance", "scores lost", "nodes", "nodes by chance"),
        *("nodes without a limit", "without, by chance"),
    )
    mean_row = with_mean(rows)[-1]
    headline = (
        f"A limit of {options.limit} of {options.nodes} nodes changes {mean_row[1]:.1%} of the choices (random scores: "
        f"{mean_row[2]:.1%}) and loses {mean_row[3]:.1%} of the probability that the chosen experts have; a token then "
        f"goes to {mean_row[4]:.2f} nodes in place of {mean_row[6]:.2f} (random scores: {mean_row[5]:.2f} and "
        f"{mean_row[7]:.2f})."
    )
    return Finding(
        "node-limit",
        headline,
        columns,
        with_mean(rows),
        _curves(lines, options),
        _assumptions(trace, options, agreed / max(recorded, 1)),
        {
            "domains": {
                name: {"changed": changed / tokens, "nodes": nodes / tokens}
                for name, (tokens, changed, nodes) in zip(trace.tokens.domains, domains.tolist(), strict=True)
                if tokens
            },
            "agreement with the trace": agreed / max(recorded, 1),
        },
    )


def _half(trace: RoutingTrace, options: Options) -> int:
    """Half of the nodes, or the smallest limit of all layers."""
    free = replace(options, limit=options.nodes)
    return max(options.nodes // 2, *(_nodes(routed, free)[1] for routed in trace.layers))


def _nodes(routed: Routed, options: Options) -> tuple[np.ndarray, int]:
    """The node of each expert, and the smallest limit under which a token finds all its experts."""
    experts = computing(routed)[1]
    if options.nodes > experts:
        raise UsageError(
            f"{routed.point.name} has {experts} experts, and {options.nodes} nodes are asked for.",
            "",
            f"Give nodes={experts} or less.",
        )
    node_E = homes(experts, options.nodes)
    least = int(np.searchsorted(np.cumsum(np.sort(np.bincount(node_E))), min(routed.point.top_k, experts))) + 1
    if options.limit < least:
        raise UsageError(
            f"{options.limit} nodes have fewer experts than the {routed.point.top_k} per token of {routed.point.name}.",
            "",
            f"Give limit={least} or more.",
        )
    return node_E, least


def _layer(routed: Routed, node_E: np.ndarray, trace: RoutingTrace, options: Options) -> list[Limited]:
    """The sums of one layer for every domain."""
    index_TK, domain_T, best_of = computing(routed)[0], trace.tokens.domain_T, BEST_OF[options.rule]
    nothing = np.zeros(options.nodes)
    found = [Limited(0, nothing, nothing, nothing, 0, 0) for _ in trace.tokens.domains]
    for at, p_TE in chunks(routed):
        here_T = domain_T[at]
        for domain in np.unique(here_T):
            mine_T = here_T == domain
            found[domain] += limited(p_TE[mine_T], index_TK[at][mine_T], node_E, best_of)
    return found


def _shares(sums: Limited, top_k: int, least: int) -> list[tuple[float | None, float | None, float | None]]:
    """Choices changed, probability lost and nodes per token, by limit; None where a limit has too few experts."""
    made, all_mass = max(sums.tokens * top_k, 1), max(float(sums.mass_M[-1]), 1e-300)
    return [
        (float(changed / made), float(1 - mass / all_mass), float(nodes / max(sums.tokens, 1)))
        if limit >= least
        else (None, None, None)
        for limit, (changed, mass, nodes) in enumerate(
            zip(sums.changed_M, sums.mass_M, sums.nodes_M, strict=True), start=1
        )
    ]


def _curves(lines: Sequence[Sequence[tuple[float | None, ...]]], options: Options) -> tuple[Curve, Curve]:
    x = tuple(range(1, options.nodes + 1))
    changed, lost, nodes, changed_c, lost_c, nodes_c = (
        [mean([layer[at][line] for layer in lines]) for at in range(options.nodes)] for line in range(6)
    )
    del lost_c
    return (
        Curve(
            "What a limit changes",
            "nodes that a token may go to",
            "share",
            x,
            {"choices changed": changed, "scores lost": lost, "changed, random scores": changed_c},
            chance="changed, random scores",
            percent=True,
        ),
        Curve(
            "Nodes of a token",
            "nodes that a token may go to",
            "nodes per token",
            x,
            {"this trace": nodes, "random scores": nodes_c},
            chance="random scores",
        ),
    )


def _assumptions(trace: RoutingTrace, options: Options, agreement: float) -> tuple[str, ...]:
    best = "the sum of their two highest scores" if options.rule == "v3" else "their highest score"
    said = [
        f"{options.rule}: nodes by {best}, neighbouring experts on {options.nodes} nodes.",
        (
            "Compared with the top-k of the same scores without a limit, which is what the model chose for "
            f"{agreement:.1%} of its choices."
        ),
        "Chance: the same scores, dealt to the experts at random. DeepSeek-V3 has 4 of 8 nodes, V2 3 devices.",
        "A model that was trained without a limit loses more than the scores say: nothing taught it to stay near.",
    ]
    if not all(routed.point.selects for routed in trace.layers):
        said.append("The model's own choice has biases or groups that the trace has not, so it is not the baseline.")
    return tuple(said)
