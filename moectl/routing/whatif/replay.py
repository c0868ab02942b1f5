"""The tokens of a trace routed again by other routers, from the scores that the model's own gave them.

What a model would have *learnt* under another router is another question: its scores were trained under its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from moectl.errors import UsageError
from moectl.report.output import Cell
from moectl.routers.spelling import Named
from moectl.routing.whatif.asked import mean, require
from moectl.routing.whatif.finding import Curve, Finding
from moectl.routing.whatif.rerouting import LONGEST, Replayed, Settings, cut_documents, layer, own
from moectl.spelling import filled
from moectl.traces.trace import RoutingTrace

REPLAYED = ("logits", "tokens", "tasks", "modalities", "nothing")
"""What a choice may need; whose tasks or modalities those of a token are, the domain of its document says."""

COLUMNS = (
    "router",
    "experts per token",
    "max vio",
    "max vio, worst layer",
    "effective experts",
    "dropped",
    "overlap",
    "overlap by chance",
    "mass moved",
)


def replay(trace: RoutingTrace, routers: Sequence[Named], seed: int = 0) -> Finding:
    """Route all tokens again under each router, and compare with what the model did.

    Raises:
        UsageError: a router needs what no trace holds, or its options make no sense for these experts.
        InputError: the trace has no scores.
    """
    found = {"the model": [own(routed) for routed in trace.layers]}
    in_pieces = 0
    for named in routers:
        settings, router = _settings(named)
        require(trace, "replay", "scores")
        found[named.text] = [layer(routed, trace.tokens, router, settings, seed) for routed in trace.layers]
        in_pieces = max(in_pieces, cut_documents(trace.tokens, settings.batch_tokens))
    rows = tuple(_row(name, layers) for name, layers in found.items())
    labels = [routed.point.label for routed in trace.layers]
    lines = {name: [each.max_vio for each in layers] for name, layers in found.items()}
    x = list(map(float, range(len(labels))))
    return Finding(
        "replay",
        _headline(rows),
        COLUMNS,
        rows,
        (Curve("Balance under each router", "MoE layer, from the first", "load above the mean", x, lines),),
        (
            "The scores are what the model learnt under its own router: trained with another it would have others.",
            "Tokens of a batch share capacities and assignments; batches are of whole documents.",
            *[_pieces(in_pieces)] * bool(in_pieces),
        ),
        {
            name: [
                {
                    "layer": each.layer,
                    "max_vio": each.max_vio,
                    "effective": each.effective,
                    "load": each.load_E.tolist(),
                    "dropped": each.dropped / max(each.wanted, 1),
                    "overlap": each.overlap,
                    "overlap_by_chance": each.chance,
                    "mass_moved": each.moved,
                }
                for each in layers
            ]
            for name, layers in found.items()
        },
    )


def _settings(named: Named) -> tuple[Settings, Named]:
    """What is written among a router's options about the replay, and the router without it."""
    about = {key: text for key, text in named.given.items() if key in ("training", "batch_tokens")}
    missing = [need for need in named.entry.needs if need not in REPLAYED]
    if missing or named.entry.kind != "router":
        raise UsageError(
            f"The router {named.entry.name} cannot be replayed.",
            f"It needs {' and '.join(missing) or 'a model'}, which no trace holds.",
            "`moectl routers` lists what each needs; train with it instead: moectl train --router.",
        )
    rest = {key: text for key, text in named.given.items() if key not in about}
    return filled(Settings, about, "A replay"), Named(named.entry, rest)


def _pieces(documents: int) -> str:
    some = "1 document is" if documents == 1 else f"{documents} documents are"
    return (
        f"{some} longer than a batch and than {LONGEST:,} tokens, and routed in pieces: to a router that goes by "
        "sequences, such as mone, each piece is one."
    )


def _row(name: str, layers: Sequence[Replayed]) -> tuple[Cell, ...]:
    kept = [(each.wanted - each.dropped) / each.tokens for each in layers]
    return (
        name,
        mean(kept),
        mean([each.max_vio for each in layers]),
        max(each.max_vio for each in layers),
        mean([each.effective for each in layers]),
        mean([each.dropped / max(each.wanted, 1) for each in layers]),
        mean([each.overlap for each in layers]),
        mean([each.chance for each in layers]),
        mean([each.moved for each in layers]),
    )


def _headline(rows: Sequence[tuple[Cell, ...]]) -> str:
    model, others = rows[0], rows[1:]

    def number(row: tuple[Cell, ...], column: str) -> float:
        value = row[COLUMNS.index(column)]
        return float(value) if isinstance(value, int | float) else 0.0

    if len(others) == 1:
        only = others[0]
        return (
            f"Under {only[0]} the busiest expert gets {number(only, 'max vio'):.0%} more than its share, under the "
            f"model's own router {number(model, 'max vio'):.0%}. It makes {number(only, 'overlap'):.0%} of the model's "
            f"choices, {number(only, 'overlap by chance'):.0%} by chance."
        )
    even = min(others, key=lambda row: number(row, "max vio"))
    near = max(others, key=lambda row: number(row, "overlap") - number(row, "overlap by chance"))
    return (
        f"Of these, {even[0]} loads the experts most evenly: the busiest gets {number(even, 'max vio'):.0%} more than "
        f"its share, under the model's own router {number(model, 'max vio'):.0%}. {near[0]} is nearest to what the "
        f"model did: {number(near, 'overlap'):.0%} of its choices, {number(near, 'overlap by chance'):.0%} by chance."
    )
