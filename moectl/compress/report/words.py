"""A summary as JSON, and as lines of text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from moectl.compress.report.findings import findings
from moectl.compress.report.summary import STORED, Layer, Summary
from moectl.report.output import size
from moectl.text import escape

MOST_LAYERS = 24
"""That a terminal is shown; of more, the middle is left out."""


def to_json(summary: Summary) -> dict[str, Any]:
    """Everything, as plain data."""
    rate = summary.rate
    return {
        "model": summary.name,
        "recipe": dict(summary.recipe),
        "calibration": dict(summary.about),
        **summary.facts,
        "stored_bytes": dict(summary.stored),
        "rate": None
        if rate is None
        else {name: getattr(rate, name) for name in ("entropy", "codes", "rows", "achieved", "headroom")},
        "layers": [
            {**layer.to_json(), "seconds": layer.seconds, "rerouted": layer.rerouted} for layer in summary.layers
        ],
        "measured": summary.measured,
        "findings": [asdict(finding) for finding in findings(summary)],
        "seconds": summary.seconds,
        "peak_bytes": summary.peak_bytes,
    }


def terminal(summary: Summary, width: int = 80) -> list[str]:
    """The table of layers, the whole model, and what stands out."""
    lines = [*_aligned(*_layer_rows(summary)), "", *sizes(summary)]
    if summary.domains:
        lines += ["", "Held-out text: loss in nats per token, KL, share of same likeliest tokens"]
        lines += _aligned(*_domain_rows(summary))
    lines += ["", f"{summary.seconds:.0f} s" + (f", {_memory(summary)}" if summary.peak_bytes else "")]
    for finding in findings(summary):
        text = f"{'!' if finding.serious else '-'} {escape(finding.what)}. {escape(finding.meaning)}".rstrip()
        lines += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def sizes(summary: Summary) -> list[str]:
    """Bytes and bits of the whole model and of its experts."""
    facts, rate = summary.facts, summary.rate
    whole = (
        f"{size(facts['source_bytes'])} -> {size(facts['weight_bytes'])}, {facts['ratio']:.1f} times smaller: "
        f"{facts['bits_per_expert_parameter']:.3f} bits per expert weight, "
        f"{facts['bits_per_parameter']:.3f} per parameter."
    )
    lines = [whole]
    if rate is not None:
        lines.append(
            f"Ternary code: entropy {rate.entropy:.3f}, achieved {rate.codes:.3f} (headroom {rate.headroom:.3f}), "
            f"rows {rate.rows:.3f} bits per weight."
        )
    shares = {part: nbytes / sum(summary.stored.values()) for part, nbytes in summary.stored.items()}
    lines.append("Bytes: " + ", ".join(f"{STORED[part]} {share:.0%}" for part, share in shares.items()) + ".")
    return [part for line in lines for part in textwrap.wrap(line, 80, subsequent_indent="  ")]


def shown(layers: Sequence[Layer]) -> Iterator[Layer | None]:
    """The layers of a long model that a terminal has room for; None where some are left out."""
    if len(layers) <= MOST_LAYERS:
        yield from layers
        return
    half = MOST_LAYERS // 2
    yield from layers[:half]
    yield None
    yield from layers[-half:]


def _layer_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rerouted = any(layer.rerouted is not None for layer in summary.layers)
    columns = ["layer", "fewest", "mean", "most tokens", "cold", "zeros", "error", "bits"]
    columns += ["rerouted"] * rerouted + ["s"]
    rows = []
    for layer in shown(summary.layers):
        if layer is None:
            rows.append(["..."] + [""] * (len(columns) - 1))
            continue
        fewest, mean, most = layer.tokens
        row = [layer.label, f"{fewest:,}", f"{mean:,.0f}", f"{most:,}", f"{layer.cold or ''}"]
        row += [f"{layer.mean('zeros'):.1%}", f"{layer.mean('error'):.4f}", f"{layer.mean('bits'):.3f}"]
        row += ["" if layer.rerouted is None else f"{layer.rerouted:.1%}"] * rerouted + [f"{layer.seconds:.1f}"]
        rows.append(row)
    return columns, rows


def _domain_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    columns = ["", "loss before", "after", "change", "perplexity", "KL", "same"]
    rows = []
    for domain, each in summary.domains.items():
        before, after, drift = each["before"], each["after"], each["drift"]
        row = [domain, f"{before['loss']:.4f}", f"{after['loss']:.4f}", f"{after['loss'] - before['loss']:+.4f}"]
        row += [f"{before['perplexity']:.4g} -> {after['perplexity']:.4g}"]
        row += [f"{drift['kl']:.4f}", f"{drift['same_next']:.1%}"]
        rows.append(row)
    return columns, rows


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [[escape(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _memory(summary: Summary) -> str:
    return f"at most {size(summary.peak_bytes or 0)} of memory"
