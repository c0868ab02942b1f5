"""The page about a compressed model: verdict, what stands out, loss, where the bits go, every expert, every layer."""

from __future__ import annotations

import json
from collections.abc import Iterator

from moectl.compress.report import figures
from moectl.compress.report.findings import MEAN, findings
from moectl.compress.report.summary import Summary
from moectl.report.html import Facts, Figure, Heading, Paragraph, Part, Table, page
from moectl.report.output import Cell, count, size

LOSS = (
    "Loss is of held-out text, in nats per token of the model's own tokenizer. KL is how far predictions moved from "
    "those of the original, which loss alone does not show; the last column is how often both find the same next token "
    "likeliest. The change in bits per byte is of the same documents, with its 95 % interval over them."
)
EXPERTS = (
    "Error is the energy of what an expert's matrices give wrongly on calibration tokens, relative to what they should "
    "give. Black: too few tokens, so rounded to nearest, and its error is that of its weights."
)
RATE = (
    "No code of independent weights with as many zeros takes less than the entropy (+ and - counted as equally "
    "likely); what codes take beyond it is headroom. Each row takes a count of codewords and two levels besides, so "
    "narrow rows cost more."
)


def render(summary: Summary, command: str = "") -> str:
    """The page as text; `command` is what makes it again."""
    parts: list[Part] = [Heading("What stands out"), *_findings(summary)]
    parts += [Heading("Quality"), *_quality(summary), Heading("Where the bits go"), figures.where_bits_go(summary)]
    if summary.rate is not None:
        parts += [Paragraph(RATE), Facts(_rate(summary))]
    if summary.layers:
        parts += [Heading("Every expert"), Paragraph(EXPERTS), *figures.maps(summary)]
        parts += [Heading("Over the layers"), *figures.over_layers(summary), _layers(summary)]
    parts += [Heading("How"), Facts(_how(summary, command))]
    return page(title(summary), _lead(summary), parts)


def title(summary: Summary) -> str:
    """What was found, in a line."""
    facts = summary.facts
    words = (
        f"{facts['ratio']:.1f} times smaller: {facts['bits_per_expert_parameter']:.2f} bits per expert weight, "
        f"{facts['bits_per_parameter']:.2f} per parameter"
    )
    if not summary.domains:
        return words
    mean = summary.domains[MEAN]
    return f"{words}; loss {mean['before']['loss']:.3f} → {mean['after']['loss']:.3f}"


def _lead(summary: Summary) -> str:
    facts = summary.facts
    experts = sum(len(layer.experts) for layer in summary.layers)
    return (
        f"{summary.name}: {count(facts['parameters'])} parameters, {size(facts['source_bytes'])} → "
        f"{size(facts['weight_bytes'])}. {experts} experts in {len(summary.layers)} layers as {summary.method}."
    )


def _findings(summary: Summary) -> Iterator[Part]:
    found = findings(summary)
    if not found:
        yield Paragraph(
            "Nothing: no cold experts, no failed factorisations, no domain that lost much more than others."
        )
        return
    yield Facts([(("! " if each.serious else "· ") + each.what, each.meaning) for each in found])


def _quality(summary: Summary) -> Iterator[Part]:
    drawn: Figure | None = figures.losses(summary)
    if drawn is None:
        yield Paragraph("Loss was not measured.")
        return
    yield Paragraph(LOSS)
    yield drawn
    columns = [
        "domain",
        "loss",
        "after",
        "change",
        "perplexity",
        "after ",
        "bits per byte",
        "interval",
        "KL",
        "interval ",
    ]
    rows: list[list[Cell]] = []
    for domain, each in summary.domains.items():
        before, after, drift = each["before"], each["after"], each["drift"]
        row: list[Cell] = [domain, _rounded(before["loss"]), _rounded(after["loss"])]
        row += [f"{after['loss'] - before['loss']:+.4f}", _rounded(before["perplexity"]), _rounded(after["perplexity"])]
        row += [f"{after['difference']:+.4f}", _interval(after["difference_interval"], "+.4f")]
        row += [_rounded(drift["kl"]), _interval(drift["kl_interval"], ".4f"), f"{drift['same_next']:.1%}"]
        rows.append(row)
    yield Table([*columns, "same next token"], rows)


def _rate(summary: Summary) -> list[tuple[str, str]]:
    rate = summary.rate
    assert rate is not None
    return [
        ("entropy", f"{rate.entropy:.4f} bits per weight"),
        ("codes", f"{rate.codes:.4f}, so headroom {rate.headroom:.4f}"),
        ("rows", f"{rate.rows:.4f}"),
        ("achieved", f"{rate.achieved:.4f}"),
    ]


def _layers(summary: Summary) -> Table:
    columns = [
        "layer",
        "experts",
        "fewest tokens",
        "mean",
        "most",
        "cold",
        "zeros",
        "error",
        "bits",
        "rerouted",
        "seconds",
    ]
    rows: list[list[Cell]] = []
    for layer in summary.layers:
        fewest, mean, most = layer.tokens
        row: list[Cell] = [layer.label, len(layer.experts), fewest, round(mean), most, layer.cold]
        row += [_rounded(layer.mean(measure)) for measure in ("zeros", "error", "bits")]
        rows.append([*row, None if layer.rerouted is None else _rounded(layer.rerouted), round(layer.seconds, 1)])
    return Table(columns, rows)


def _how(summary: Summary, command: str) -> list[tuple[str, str]]:
    facts = [
        ("command", command),
        ("model", summary.name),
        *((name.replace("_", " "), _plain(value)) for name, value in summary.recipe.items()),
        *((f"calibration: {name.replace('_', ' ')}", _plain(value)) for name, value in summary.about.items()),
        ("seconds", f"{summary.seconds:.1f}"),
        ("peak memory", size(summary.peak_bytes) if summary.peak_bytes else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _plain(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _interval(between: tuple[float, float] | None, form: str) -> str:
    return "" if between is None else f"{between[0]:{form}} to {between[1]:{form}}"
