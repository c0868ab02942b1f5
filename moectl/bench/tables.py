"""What the rows of a result look like: all columns for programs, few for a person, one sentence to sum up."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from moectl.bench.peers import PEERS
from moectl.report.output import Cell, count, size

Row = dict[str, Any]

SHORT = {
    "backend": "backend",
    "p50_ms": "ms",
    "tflops": "TFLOP/s",
    "weights_per_s": "Gweights/s",
    "gbs": "GB/s",
    "percent_of_floor": "% floor",
    "peak_bytes": "peak",
    "max_error": "error",
    "speedup": "×",
}


def full(document: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Every field of every row, the columns in the order of the fields."""
    rows: list[Row] = document["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[rounded(row.get(column), 6) for column in columns] for row in rows]


def short(document: dict[str, Any]) -> Iterable[tuple[str, list[str], list[list[Cell]]]]:
    """Tables for a terminal: title, columns, rows. Rows without a time are left out."""
    rows = [row for row in document["rows"] if row.get("p50_ms")]
    if document["kind"] == "model":
        yield "", *_models(rows)
        return
    if document["kind"] == "routers":
        for (model, dtype, tokens), group in groupby(rows, lambda row: (row["model"], row["dtype"], row["tokens"])):
            yield f"{model} {dtype}, {tokens} tokens", *_routers(list(group))
        return
    for (model, dtype, what), group in groupby(rows, lambda row: (row["model"], row["dtype"], row.get("what"))):
        title = " ".join(word for word in (model, dtype, what) if word)
        unit, factor = flops_unit(document, dtype)
        yield f"{title}, ideal within {roof_words(document, dtype)}", *_layers(list(group), unit, factor)


def flops_unit(document: dict[str, Any], dtype: str) -> tuple[str, float]:
    """The unit that suits the device, and how many of it make a TFLOP/s."""
    roof = next(roof for roof in document["roofs"] if roof["dtype"] == dtype)
    return ("TFLOP/s", 1.0) if roof["tflops"] >= 1 else ("GFLOP/s", 1000.0)


def _layers(rows: list[Row], unit: str, factor: float) -> tuple[list[str], list[list[Cell]]]:
    rows = [{**row, "tflops": factor * row["tflops"] if row.get("tflops") else None} for row in rows]
    names = {**SHORT, "tflops": unit}
    name = "stage" if "stage" in rows[0] else "backend"
    known = ("p50_ms", "tflops", "weights_per_s", "gbs", "percent_of_floor", "peak_bytes", "max_error", "speedup")
    keys = [key for key in known if any(row.get(key) is not None for row in rows)]
    columns = ["tokens", name, *(names[key] for key in keys)]
    columns.insert(3, "p20-p80")
    out = []
    for row in rows:
        cells: list[Cell] = [row["tokens"], row[name], *(cell(key, row.get(key)) for key in keys)]
        cells.insert(3, f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}")
        out.append(cells)
    return columns, out


def _models(rows: list[Row]) -> tuple[list[str], list[list[Cell]]]:
    columns = ["model", "backend", "parameters", "prefill/s", "first ms", "decode/s", "ms (p20-p80)", "generate/s"]
    columns += ["weights", "peak", "×"]
    return columns, [
        [
            row["model"],
            row["backend"],
            count(row["parameters"]),
            rounded(row["prefill_tokens_per_s"], 3),
            rounded(row["ttft_ms"], 3),
            rounded(row["decode_tokens_per_s"], 3),
            f"{row['p50_ms']:.3g} ({row['p20_ms']:.3g}-{row['p80_ms']:.3g})",
            rounded(row["generate_tokens_per_s"], 3),
            cell("weight_bytes", row.get("weight_bytes")),
            cell("peak_bytes", row["peak_bytes"]),
            rounded(row["speedup"], 3),
        ]
        for row in rows
    ]


def _routers(rows: list[Row]) -> tuple[list[str], list[list[Cell]]]:
    columns = ["router", "ms", "p20-p80", "tokens/s", "max/mean load", "dropped %", "×"]
    return columns, [
        [
            row["backend"],
            rounded(row["p50_ms"], 3),
            f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}",
            count(row["tokens_per_s"]),
            rounded(row["imbalance"], 3),
            rounded(100 * row["dropped"], 2),
            rounded(row["speedup"], 3),
        ]
        for row in rows
    ]


def missing(document: dict[str, Any]) -> list[str]:
    """Why rows have no time: one line per reason, naming whom it stopped and, where not always, at how many tokens."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in document["rows"]:
        if row.get("reason"):
            reasons.setdefault((row.get("backend") or row.get("stage"), row["reason"]), []).append(row)
    lines = []
    for (name, reason), rows in reasons.items():
        everywhere = len(rows) == sum((row.get("backend") or row.get("stage")) == name for row in document["rows"])
        tokens = sorted({row["tokens"] for row in rows if row.get("tokens")})
        where = f" at {', '.join(map(str, tokens))} tokens" if tokens else f" with {rows[0]['model']}"
        where = "" if everywhere else where
        lines.append(f"{name}{where}: {reason}")
    return lines


def finding(document: dict[str, Any]) -> str:
    """The result in one sentence: ours against the fastest of the others, cell by cell."""
    rows = [row for row in document["rows"] if row.get("p50_ms")]
    if document["kind"] == "routers":
        return _routers_finding(rows)
    if document["kind"] != "layer" or not rows:
        best = max(rows, key=lambda row: row.get("speedup") or 0, default=None)
        if document["kind"] == "model" and best and len(rows) > 1:
            return f"{best['model']} ({best['backend']}) decodes fastest: {best['decode_tokens_per_s']:.3g} tokens/s"
        if document["kind"] == "kernels" and document["settings"].get("what") == "ternary":
            return _ternary_finding(rows)
        return "Where the time of the expert layer goes" if document["kind"] == "kernels" else "Measured"
    ratios, others = [], set()
    for _, group in groupby(rows, lambda row: (row["model"], row["dtype"], row["what"], row["tokens"])):
        cell = list(group)
        ours = [row["p50_ms"] for row in cell if row["backend"] == "moectl"]
        theirs = [row["p50_ms"] for row in cell if not _is_ours(row)]
        others |= {row["backend"] for row in cell if not _is_ours(row)}
        if ours and theirs:
            ratios.append(min(theirs) / min(ours))
    if not ratios:
        best = max(rows, key=lambda row: row["percent_of_floor"])
        return f"{best['backend']} reaches {best['percent_of_floor']:.0f} % of the floor at best"
    low, high, won = min(ratios), max(ratios), sum(ratio > 1 for ratio in ratios)
    span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    cells = f"all {len(ratios)} cells" if won == len(ratios) else f"{won} of {len(ratios)} cells"
    rivals = "the fastest of the others" if len(others) > 1 else next(iter(others))
    return f"moectl is {span} times as fast as {rivals}, and ahead in {cells}"


def _routers_finding(rows: list[Row]) -> str:
    """The routers of the fused kernel against plain torch, and the range of all."""
    speeds = [row["tokens_per_s"] for row in rows]
    if not speeds:
        return "Nothing was measured"
    told = f"{count(min(speeds))} to {count(max(speeds))} tokens/s"
    ratios = [row["speedup"] for row in rows if row.get("speedup")]
    if not ratios:
        return told
    return f"{told}; the fused ones are {min(ratios):.2f} to {max(ratios):.2f} times as fast as plain torch"


def _ternary_finding(rows: list[Row]) -> str:
    """Ours against torch.mv at the fewest tokens: one projection of an expert or a few."""
    fewest = min((row["tokens"] for row in rows), default=0)
    ours = [row for row in rows if row["stage"] == "ternary" and row["tokens"] == fewest and row["what"] != "layer"]
    low, high = (edge((row["speedup"] for row in ours if row["speedup"]), default=0.0) for edge in (min, max))
    if not high:
        return "Ternary experts beside dense ones"
    floor = max(row["percent_of_floor"] for row in ours)
    at = f"at {fewest} token" + ("s" if fewest > 1 else "")
    return f"ternary products are {low:.2f} to {high:.2f} times as fast as torch.mv {at}, at {floor:.3g} % of the floor"


def _is_ours(row: Row) -> bool:
    return row["backend"] in PEERS and PEERS[row["backend"]].ours


def rounded(value: Any, digits: int) -> Cell:
    """A number with so many significant digits; all else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def cell(key: str, value: Any) -> Cell:
    """A value as a person reads it."""
    if key in ("peak_bytes", "weight_bytes"):
        return None if value is None else size(value)
    if key == "weights_per_s" and value:
        return rounded(value / 1e9, 3)
    return rounded(value, 2 if key == "max_error" else 3)


def roof_words(document: dict[str, Any], dtype: str) -> str:
    """The two speeds of the device, for a person."""
    roof = next(roof for roof in document["roofs"] if roof["dtype"] == dtype)
    unit, factor = flops_unit(document, dtype)
    return f"{factor * roof['tflops']:.3g} {unit} and {roof['gbs']:.3g} GB/s"
