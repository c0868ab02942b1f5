"""Tables for a README out of result files, between markers, so that they cannot drift from the data.

The table of `results/NAME.json` stands between `<!-- bench NAME -->` and `<!-- /bench NAME -->`.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from moectl.bench.baseline import read
from moectl.bench.tables import Row, cell, missing, roof_words, rounded
from moectl.errors import CheckFailed, InputError, UsageError
from moectl.report.output import count, plain
from moectl.text import shown


def tables(files: list[Path]) -> dict[str, str]:
    """Markdown by name, one table per file.

    Raises:
        InputError: a file is not a result.
        UsageError: two files have one name.
    """
    made = {file.stem: table(read(file)) for file in files}
    if len(made) < len(files):
        raise UsageError("Two of the files have the same name.", "A table is found by it.", "Rename one.")
    return made


def replaced(text: str, made: dict[str, str], where: Path) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        InputError: a pair of markers is missing.
    """
    for name, markdown in made.items():
        start, end = f"<!-- bench {name} -->", f"<!-- /bench {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise InputError(
                f"{shown(str(where))} has no place for the table of {shown(name)}.",
                "It has to stand between markers, once.",
                f"Add the lines {shown(start)} and {shown(end)}.",
            )
        before, after = pattern.split(text)
        text = f"{before}{start}\n{markdown}\n{end}{after}"
    return text


def require_in_step(text: str, made: dict[str, str], where: Path) -> None:
    """Raises CheckFailed if `text` is not what `replaced` would make of it."""
    stale = [name for name, one in made.items() if replaced(text, {name: one}, where) != text]
    if stale:
        raise CheckFailed(
            f"{shown(str(where))} is behind its data: {shown(', '.join(stale))}.",
            "Its tables are not what the result files say.",
            "Run the same command with --write instead of --check.",
        )


def table(document: dict[str, Any]) -> str:
    """One document: a row per cell, a column per measured backend; below it, on what and with which command."""
    rows = [row for row in document["rows"] if row.get("p50_ms")]
    make = {"layer": _layer, "kernels": _kernels, "model": _model, "routers": _routers}[document["kind"]]
    device = document["device"]
    versions = ", ".join(f"{name} {device['versions'][name]}" for name in ("torch", "triton", "transformers"))
    threads = f", {device['threads']} thread(s)" if device.get("threads") else ""
    lines = [*make(rows), "", f"{device['name']}{threads}; {versions}."]
    if document.get("roofs"):
        roofs = (f"{roof['dtype']} {roof_words(document, roof['dtype'])}" for roof in document["roofs"])
        lines[-1] += f" Roof in the same run: {'; '.join(roofs)}."
    lines += [f"`{document['command']}`"] if document.get("command") else []
    reasons = missing(document)
    lines += ["", f"Not measured: {'; '.join(reasons)}."] if reasons else []
    return "\n".join(lines)


def _layer(rows: list[Row]) -> list[str]:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    lines = _head(["d,f,E,k or model", "dtype", "pass", "tokens", *backends], numeric_from=3)
    for (model, dtype, what, tokens), group in groupby(
        rows, lambda row: (row["model"], row["dtype"], row["what"], row["tokens"])
    ):
        cell = {row["backend"]: row for row in group}
        fastest = min(row["p50_ms"] for row in cell.values())
        lines.append(_line([model, dtype, what, tokens, *(_time(cell.get(name), fastest) for name in backends)]))
    return [*lines, "", "Milliseconds (percent of the floor for the routing drawn); the fastest in bold."]


def _time(row: Row | None, fastest: float) -> str:
    if row is None:
        return ""
    time = plain(rounded(row["p50_ms"], 3))
    time = f"**{time}**" if row["p50_ms"] == fastest else time
    return f"{time} ({row['percent_of_floor']:.0f} %)"


def _kernels(rows: list[Row]) -> list[str]:
    columns = {"p50_ms": "ms", "gbs": "GB/s", "percent_of_floor": "% of floor"}
    if "what" in rows[0]:
        columns |= {"speedup": f"× {rows[0]['stage']}", "weights_per_s": "Gweights/s"}
    lines = _head(["d,f,E,k or model", "dtype", "tokens", "stage", *columns.values()], numeric_from=4)
    for row in rows:
        numbers = [plain(cell(key, row.get(key))) for key in columns]
        stage = f"{row['what']}: {row['stage']}" if "what" in row else row["stage"]
        lines.append(_line([row["model"], row["dtype"], row["tokens"], stage, *numbers]))
    return lines


def _routers(rows: list[Row]) -> list[str]:
    columns = ["ms", "tokens/s", "max/mean load", "dropped %", "× plain torch"]
    lines = _head(["d,f,E,k or model", "dtype", "tokens", "router", *columns], numeric_from=4)
    for row in rows:
        times = (plain(rounded(row["p50_ms"], 3)), count(row["tokens_per_s"]))
        shares = (row["imbalance"], 100 * row["dropped"], row["speedup"])
        numbers = [*times, *(plain(rounded(share, 3)) for share in shares)]
        lines.append(_line([row["model"], row["dtype"], row["tokens"], row["backend"], *numbers]))
    return lines


def _model(rows: list[Row]) -> list[str]:
    names = ["model", "backend", "parameters", "prefill tokens/s", "first token ms", "decode tokens/s"]
    lines = _head([*names, "generate tokens/s", "weights", "peak memory"], numeric_from=2)
    keys = ("prefill_tokens_per_s", "ttft_ms", "decode_tokens_per_s", "generate_tokens_per_s")
    for row in rows:
        numbers = [plain(rounded(row[key], 3)) for key in keys]
        memory = [plain(cell(key, row.get(key))) for key in ("weight_bytes", "peak_bytes")]
        lines.append(_line([row["model"], row["backend"], count(row["parameters"]), *numbers, *memory]))
    return lines


def _head(columns: list[str], numeric_from: int) -> list[str]:
    rule = ["---" if i < numeric_from else "---:" for i in range(len(columns))]
    return [_line(columns), f"|{'|'.join(rule)}|"]


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(shown(cell).replace("|", "\\|") for cell in cells) + " |"
