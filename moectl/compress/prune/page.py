"""The page about a pruned model: what stands out, which experts went and how much they mattered, loss by domain.

Legend: E experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from moectl.checkpoint.plan import Plan
from moectl.compress.prune.recipe import METHODS
from moectl.compress.prune.scores import TOKENS, Scores
from moectl.data.documents import EVERY_BUILTIN
from moectl.report.charts import Bar, bars
from moectl.report.heat import DIVERGING, SEQUENTIAL, Shade, heat
from moectl.report.html import Facts, Figure, Heading, Paragraph, Part, Table, page
from moectl.report.output import Cell, count, size
from moectl.report.plots import Line, lines
from moectl.text import escape as visible

MOST_CELLS = 256
"""Columns of the heat map; neighbours are pooled where there are more experts."""
CLOSE = 0.02
"""The first that went scores less than the last that stayed by less than this share of the latter's score."""
LOST = 0.10
"""A rise of a domain's loss, as a share of it."""
UNEVEN = 2.0
"""What went of a layer's score, as a multiple of the median layer's."""
WHEN = ("before", "after")
THIRDS = ("low", "middle", "high")
GONE = tuple(Shade(DIVERGING[2 - place], f"removed: {third}") for place, third in enumerate(THIRDS))
STAYED = tuple(Shade(SEQUENTIAL[2 * place + 1], f"kept: {third}") for place, third in enumerate(THIRDS))
MAP = "Orange went, blue stayed; the darker, the nearer its score is to the highest of its layer."
PROBE = (
    "Loss is of held-out text, in nats per token. Generation can break where loss hardly moves, so both models "
    "continue the same texts: what share of the 4-grams repeats earlier ones, and how unlikely to the original is what "
    "was written."
)


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kept: the experts that stayed.
        score_E: how much each mattered.
        tokens_E: how often each was chosen; None if nobody counted.
    """

    number: int
    kept: tuple[int, ...]
    score_E: np.ndarray
    tokens_E: np.ndarray | None

    @property
    def gone(self) -> tuple[int, ...]:
        """The experts that went."""
        return tuple(expert for expert in range(len(self.score_E)) if expert not in set(self.kept))

    @property
    def lost(self) -> float:
        """The share of the score that went."""
        return _share(self.score_E, self.gone)

    @property
    def rerouted(self) -> float | None:
        """The share of choices that fell on experts that went."""
        return None if self.tokens_E is None else _share(self.tokens_E, self.gone)

    @property
    def margin(self) -> float:
        """How far the most that went is below the least that stayed, as a share of the latter; below 0 in groups."""
        least = float(self.score_E[list(self.kept)].min())
        return (least - float(self.score_E[list(self.gone)].max())) / least if least else 0.0


def render(plan: Plan, scores: Scores, probed: Mapping[str, Mapping[str, Any]], command: str = "") -> str:
    """The page as text.

    Args:
        plan: of the pruned checkpoint, some of whose experts are gone.
        probed: by domain, as `Probe.to_json` has it; empty if nothing was measured.
        command: what makes it again.
    """
    layers = list(_layers(plan, scores))
    parts: list[Part] = [Heading("What stands out"), *_findings(plan, scores, layers, probed)]
    parts += [Heading("Loss and generation"), *_measured(probed), Heading("Every expert"), _map(plan, layers)]
    if plan.recipe["saliency"] in ("reap", "frequency", "ean"):
        parts += [Heading("Over the layers"), _over_layers(layers)]
    parts += [_table(layers), Heading("How"), Facts(_how(plan, command))]
    return page(_title(plan, probed), _lead(plan), parts)


def _layers(plan: Plan, scores: Scores) -> Iterator[Layer]:
    method, count = plan.recipe["saliency"], plan.recipe["keep"]
    for number, kept in plan.recipe["kept"].items():
        score_E = scores.saliency(method, int(number), count)
        yield Layer(int(number), tuple(kept), score_E, scores.layers[int(number)].get(TOKENS))


def _title(plan: Plan, probed: Mapping[str, Mapping[str, Any]]) -> str:
    facts = plan.facts
    words = f"{facts['experts']} of {facts['source_experts']} experts kept in every layer"
    if not probed:
        return words
    before, after = (fmean(each[f"loss_{when}"] for each in probed.values()) for when in WHEN)
    return f"{words}; loss {before:.3f} → {after:.3f}"


def _lead(plan: Plan) -> str:
    facts, source = plan.facts, plan.sources[0]
    return (
        f"{source.name}: {count(facts['source_parameters'])} → {count(facts['parameters'])} parameters, "
        f"{size(facts['source_bytes'])} → {size(facts['weight_bytes'])}. Those that stayed are the best by "
        f"{plan.recipe['saliency']}: {METHODS[plan.recipe['saliency']]}."
    )


def _findings(
    plan: Plan, scores: Scores, layers: list[Layer], probed: Mapping[str, Mapping[str, Any]]
) -> Iterator[Part]:
    found = [*_of_domains(probed), *_of_layers(plan, layers), *_of_data(scores, layers)]
    yield Facts(found) if found else Paragraph("Nothing: no domain lost much, and no layer lost more than the others.")


def _of_domains(probed: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    if not probed:
        yield "! Quality was not measured", "How much worse the model has become is not known from here."
    for domain, each in probed.items():
        if each["broken"]:
            yield f"! Generation breaks on {domain}", f"{each['broken']}. Remove fewer experts, or choose on such text."
        rise = each["loss_after"] / each["loss_before"] - 1
        if rise > LOST:
            yield f"! Loss on {domain} rose by {rise:.0%}", "Choose on such text (--data), or remove fewer experts."


def _of_layers(plan: Plan, layers: list[Layer]) -> Iterator[tuple[str, str]]:
    if plan.recipe["saliency"] in ("reap", "frequency", "ean"):
        worst, typical = max(layers, key=lambda layer: layer.lost), median(layer.lost for layer in layers)
        if worst.lost > UNEVEN * typical:
            yield (
                f"· Layer {worst.number} lost {worst.lost:.1%} of its score, {typical:.1%} is the median",
                "As many experts go from every layer, though some need theirs more than others.",
            )
    if plan.recipe["saliency"] != "naee":
        close = [layer.number for layer in layers if 0 <= layer.margin < CLOSE]
        if close:
            yield (
                f"· Layers where it was close: {', '.join(map(str, close[:8]))}{' and others' if close[8:] else ''}",
                f"What went and what stayed differ by less than {CLOSE:.0%}: other text would choose otherwise.",
            )


def _of_data(scores: Scores, layers: list[Layer]) -> Iterator[tuple[str, str]]:
    if scores.about.get("data") == list(EVERY_BUILTIN):
        yield "! Chosen on built-in text", "Code, its documentation and sums. Give --data like what the model is for."
    unseen = [int((layer.tokens_E == 0).sum()) for layer in layers if layer.tokens_E is not None]
    if any(unseen):
        yield (
            f"· Experts given no token: {sum(unseen)}, in layers: {sum(map(bool, unseen))}",
            "They went first, though other text may need them. More --samples or other --data would tell.",
        )


def _measured(probed: Mapping[str, Mapping[str, Any]]) -> Iterator[Part]:
    if not probed:
        yield Paragraph("Not measured.")
        return
    yield Paragraph(PROBE)
    groups = [(visible(domain), [_bar(when, each) for when in WHEN]) for domain, each in probed.items()]
    rises = {domain: each["loss_after"] - each["loss_before"] for domain, each in probed.items()}
    worst = max(rises, key=lambda domain: rises[domain])
    title = f"{visible(worst)} lost most: {rises[worst]:+.3f} nats per token"
    told = "; ".join(f"{name}: {one.value:.3f} before, {two.value:.3f} after" for name, (one, two) in groups)
    drawn = bars(title, told + ".", groups, WHEN, "nats per token of held-out text")
    yield Figure(title, drawn, "Held-out text, before and after.", "loss")
    names = [f"{name}_{when}" for name in ("loss", "repeated", "surprise") for when in WHEN]
    rows: list[list[Cell]] = [
        [domain, *(_rounded(each[name]) for name in names), each["broken"]] for domain, each in probed.items()
    ]
    yield Table(["domain", *(name.replace("_", " ") for name in names), "broken"], rows)


def _bar(when: str, probed: Mapping[str, Any]) -> Bar:
    loss = probed[f"loss_{when}"]
    return Bar(when, loss, f"{loss:.4f}")


def _map(plan: Plan, layers: list[Layer]) -> Figure:
    """Layer by expert: the third of its layer's range that a score is in; orange what went, blue what stayed."""
    experts = plan.facts["source_experts"]
    each = -(-experts // MOST_CELLS)
    starts = range(0, experts, each)
    levels = []
    for layer in layers:
        low, high = layer.score_E.min(), layer.score_E.max()
        share_E = (layer.score_E - low) / (high - low) if high > low else np.zeros(experts)
        kept_E = np.isin(np.arange(experts), layer.kept)
        cells = [slice(start, start + each) for start in starts]
        levels.append([min(2, int(share_E[cell].mean() * 3)) + 3 * int(kept_E[cell].mean() >= 0.5) for cell in cells])
    used = sorted({level for row in levels for level in row})
    gone = sum(len(layer.gone) for layer in layers)
    title = f"{gone} of {experts * len(layers)} experts went"
    note = f" A cell stands for {each} neighbouring experts." if each > 1 else ""
    svg = heat(
        title,
        f"{len(layers)} layers by {experts} experts, {plan.facts['experts']} of which stayed in each. {MAP}{note}",
        [[used.index(level) for level in row] for row in levels],
        [(*GONE, *STAYED)[level] for level in used],
        [str(layer.number) for layer in layers],
        [str(start) for start in starts],
        ("expert", "layer"),
    )
    return Figure(title, svg, MAP + note, "experts")


def _over_layers(layers: list[Layer]) -> Figure:
    worst = max(layers, key=lambda layer: layer.lost)
    title = f"Layer {worst.number} lost most: {worst.lost:.1%} of its score"
    series = [Line("of the score", [100 * layer.lost for layer in layers])]
    if all(layer.rerouted is not None for layer in layers):
        series.append(Line("of the choices", [100 * (layer.rerouted or 0.0) for layer in layers]))
    told = f"From {min(layer.lost for layer in layers):.1%} to {worst.lost:.1%}."
    drawn = lines(title, told, [str(layer.number) for layer in layers], series, ("layer", "% that went"))
    return Figure(title, drawn, "What the experts that went had, of all experts of the layer.", "layers")


def _table(layers: list[Layer]) -> Table:
    columns = [
        "layer",
        "kept",
        "went",
        "% of the score",
        "% of the choices",
        "least kept",
        "most that went",
        "which went",
    ]
    rows: list[list[Cell]] = []
    for layer in layers:
        shares = [_rounded(100 * layer.lost), None if layer.rerouted is None else _rounded(100 * layer.rerouted)]
        ends = [_rounded(layer.score_E[list(layer.kept)].min()), _rounded(layer.score_E[list(layer.gone)].max())]
        which = ", ".join(map(str, layer.gone[:24])) + (f" and {len(layer.gone) - 24} more" if layer.gone[24:] else "")
        rows.append([layer.number, len(layer.kept), len(layer.gone), *shares, *ends, which])
    return Table(columns, rows)


def _how(plan: Plan, command: str) -> list[tuple[str, str]]:
    measured = {f"scores: {name}": value for name, value in (plan.recipe["scores"] or {}).items()}
    facts = {"command": command, "model": plan.sources[0].name, "method": plan.recipe["saliency"], **measured}
    return [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in facts.items()
        if value not in ("", None)
    ]


def _share(value_E: np.ndarray, which: tuple[int, ...]) -> float:
    total = float(value_E.sum())
    return float(value_E[list(which)].sum()) / total if total else 0.0


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")
