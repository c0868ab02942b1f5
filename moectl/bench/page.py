"""The HTML report of a result: what was found, roofline and bars, all rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from moectl.bench.tables import Row, finding, missing, rounded
from moectl.report.charts import Bar, Point, bars, roofline
from moectl.report.html import Facts, Figure, Heading, Paragraph, Part, Table, page
from moectl.report.svg import number

FLOOR = (
    "The floor is the least time for the routing that was drawn: all FLOPs at the speed of a large product, or every "
    "byte read and written once at the speed of a large copy, whichever takes longer; both speeds are of the same run."
)
TERNARY = (
    "The floor is the same for all: the codewords, counts and levels of the experts that got rows, read once at the "
    "speed of a large copy of the same run. On a GPU every way is timed as a CUDA graph."
)
ROUTERS = (
    "All routers are in use: no noise, no losses. They get the same hidden states, whose mean makes linear gates like "
    "some experts more; those that go by logits get logits, the others are timed with the gate of their own. Load is "
    "that of the busiest expert over the mean."
)
MODEL = (
    "The backends of one model take turns on the same weights and prompts; models come one after the other. Decode is "
    "the median time of a token after the prompt, without `generate` around it; the time to the first token is with it."
)


def render(document: dict[str, Any]) -> str:
    """The page as text."""
    parts: list[Part] = [*_figures(document), Heading("All rows"), _table(document)]
    reasons = missing(document)
    if reasons:
        split = (reason.partition(": ") for reason in reasons)
        parts += [Heading("Not measured"), Facts([(name, reason) for name, _, reason in split])]
    parts += [Heading("How"), Paragraph(_how(document)), Facts(_facts(document))]
    return page(finding(document), _lead(document), parts)


def _how(document: dict[str, Any]) -> str:
    if document["kind"] == "model":
        return MODEL
    if document["kind"] == "routers":
        return ROUTERS
    return TERNARY if document["settings"].get("what") == "ternary" else FLOOR


def _figures(document: dict[str, Any]) -> Iterator[Part]:
    rows = [row for row in document["rows"] if row.get("p50_ms")]
    if document["kind"] == "model":
        yield from _model_figures(rows)
        return
    if document["kind"] == "routers":
        yield from _router_figures(rows)
        return
    label = "stage" if document["kind"] == "kernels" else "backend"
    series = list(dict.fromkeys(row[label] for row in rows))
    for (model, dtype, what), group in groupby(rows, lambda row: (row["model"], row["dtype"], row.get("what", ""))):
        cells = list(group)
        title = " ".join(word for word in (model, dtype, PASSES.get(what, "")) if word)
        yield Heading(title)
        name = f"{model}-{dtype}-{what or 'stages'}"
        roof = next(roof for roof in document["roofs"] if roof["dtype"] == dtype)
        points = [_point(row, label) for row in cells if row.get("tflops") and row.get("gbs")]
        if points:
            yield Figure(
                "Under the roof",
                roofline(
                    f"{title}: roofline",
                    _roof_words(points, roof),
                    points,
                    series,
                    roof["tflops"] * 1e12,
                    roof["gbs"] * 1e9,
                ),
                f"One point per {label} and number of tokens; the line is what this device did in the same run.",
                f"{name}-roofline",
            )
        yield _bars(cells, title, name, series, label)


PASSES = {"fwd": "forward", "bwd": "backward", "train": "forward and backward", "decode": "decode"}
PASSES |= {"up": "up-projection", "down": "down-projection", "layer": "whole layer"}


def _bars(cells: list[Row], title: str, name: str, series: list[str], label: str) -> Figure:
    """Share of the floor where all rows have one, else milliseconds."""
    shares = label == "backend"
    groups = []
    for tokens, group in groupby(cells, lambda row: row["tokens"]):
        mine = [_share(row, label) if shares else _time(row, label) for row in group]
        groups.append((f"{tokens:,} token{'s' if tokens > 1 else ''}", mine))
    best = max(cells, key=lambda row: row.get("percent_of_floor") or 0)
    told = f"{len(cells)} bars in {len(groups)} groups by number of tokens. "
    told += (
        f"The best is {best[label]} at {best['tokens']} tokens with {best['percent_of_floor']:.0f} % of the floor."
        if best.get("percent_of_floor")
        else "Milliseconds per call."
    )
    axis = "percent of the floor (100 = as fast as the roof)" if shares else "milliseconds"
    drawing = bars(f"{title}: {axis}", told, groups, series, axis, full=100.0 if shares else None)
    caption = "Median of the calls; the whisker goes from the 20th to the 80th percentile of the times."
    if shares:
        caption += " The roof is a copy and a matrix product measured in the same run; a pure read may exceed it."
    if over := cells[0].get("speedup_over"):
        caption += f" × is the speed-up over {over}."
    return Figure("Share of the floor" if shares else "Time by stage", drawing, caption, f"{name}-bars")


def _share(row: Row, label: str) -> Bar:
    percent = row["percent_of_floor"]
    note = f"{percent:.3g} % · {row['p50_ms']:.3g} ms" + (f" · {row['speedup']:.2f}×" if row.get("speedup") else "")
    low, high = (percent * row["p50_ms"] / row[key] for key in ("p80_ms", "p20_ms"))
    return Bar(row[label], percent, note, low, high)


def _time(row: Row, label: str) -> Bar:
    return Bar(row[label], row["p50_ms"], f"{row['p50_ms']:.3g} ms", row["p20_ms"], row["p80_ms"])


def _point(row: Row, label: str) -> Point:
    words = f"{row[label]}, {row['tokens']} tokens: {row['tflops']:.3g} TFLOP/s, {row['p50_ms']:.3g} ms"
    column = f"T = {row['tokens']}" if label == "backend" else ""  # stages of one T do not stand above each other
    return Point(row[label], row["tflops"] * 1000 / row["gbs"], row["tflops"] * 1e12, column, words)


def _roof_words(points: list[Point], roof: dict[str, Any]) -> str:
    best = max(points, key=lambda point: point.speed)
    return (
        f"Roof: {roof['tflops']:.3g} TFLOP/s and {roof['gbs']:.3g} GB/s. Highest of {len(points)} points: {best.label}."
    )


def _router_figures(rows: list[Row]) -> Iterator[Part]:
    for (model, dtype), group in groupby(rows, lambda row: (row["model"], row["dtype"])):
        cells, title = list(group), f"{model} {dtype}"
        series = list(dict.fromkeys(row["backend"] for row in cells))
        yield Heading(title)
        for key, axis in (("p50_ms", "milliseconds"), ("imbalance", "largest over mean load")):
            groups = [
                (f"{tokens:,} token{'s' if tokens > 1 else ''}", [_bar(row, key) for row in at_once])
                for tokens, at_once in groupby(cells, lambda row: row["tokens"])
            ]
            drawing = bars(f"{title}: {axis}", f"{len(cells)} bars.", groups, series, axis)
            yield Figure(
                axis.capitalize(), drawing, "Median of the calls, mean of the inputs.", f"{model}-{dtype}-{key}"
            )


def _bar(row: Row, key: str) -> Bar:
    return Bar(row["backend"], row[key], f"{row[key]:.3g}")


def _model_figures(rows: list[Row]) -> Iterator[Part]:
    series = list(dict.fromkeys(row["backend"] for row in rows))
    for key, heading in (
        ("decode_tokens_per_s", "Decode, tokens per second"),
        ("prefill_tokens_per_s", "Prefill, tokens per second"),
        ("ttft_ms", "Time to first token, milliseconds"),
    ):
        groups = [
            (str(model), [Bar(row["backend"], row[key], number(row[key])) for row in group])
            for model, group in groupby(rows, lambda row: row["model"])
        ]
        if groups:
            told = f"{len(rows)} bars in {len(groups)} groups by model."
            yield Figure(heading, bars(heading, told, groups, series, heading.split(", ")[1]), "Medians.", key)


COLUMNS = {
    "model": "model",
    "dtype": "dtype",
    "what": "pass",
    "tokens": "tokens",
    "backend": "backend",
    "stage": "stage",
    "p50_ms": "ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "percent_of_floor": "% of floor",
    "floor_ms": "floor ms",
    "tflops": "TFLOP/s",
    "weights_per_s": "weights/s",
    "gbs": "GB/s",
    "prefill_tokens_per_s": "prefill tokens/s",
    "ttft_ms": "first token ms",
    "decode_tokens_per_s": "decode tokens/s",
    "generate_tokens_per_s": "generate tokens/s",
    "parameters": "parameters",
    "weight_bytes": "weight bytes",
    "peak_bytes": "peak bytes",
    "speedup": "speed-up",
    "max_error": "max error",
    "rms_error": "rms error",
    "active_experts": "active experts",
    "imbalance": "imbalance",
    "padding_waste": "padding",
    "reps": "calls",
}
"""The fields a reader looks for, in that order, and what they are called."""


def _table(document: dict[str, Any]) -> Table:
    """The rows that have a time; columns that nobody filled are left out."""
    rows = [row for row in document["rows"] if row.get("p50_ms")]
    kept = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return Table([COLUMNS[key] for key in kept], [[rounded(row.get(key), 4) for key in kept] for row in rows])


def _lead(document: dict[str, Any]) -> str:
    device, settings = document["device"], document["settings"]
    threads = f" with {device['threads']} thread{'s' if device['threads'] > 1 else ''}" if device.get("threads") else ""
    return f"Measured on {device['name']}{threads}" + (
        f"; {settings['routing']} routing." if settings.get("routing") else "."
    )


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    device = document["device"]
    facts = [("command", document.get("command", ""))]
    facts += [
        (name, str(value)) for name, value in device.items() if name not in ("versions", "kind") and value is not None
    ]
    facts += list(device["versions"].items())
    for roof in document.get("roofs", []):
        facts.append((f"roof, {roof['dtype']}", f"{roof['tflops']:.4g} TFLOP/s, {roof['gbs']:.4g} GB/s"))
    return [(name, value) for name, value in facts if value]
