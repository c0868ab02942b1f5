"""`moectl inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options
from moectl.cli.opening import opened


def inspect(
    model: options.Model,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also read the weights: health of experts and routers.")
    ] = False,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Show family, sizes, parameters (total and active) and bytes by component of any checkpoint."""
    from moectl.evaluation.inspect import inspect as measure
    from moectl.report import output

    checkpoint = opened(model, revision)
    found = measure(checkpoint)
    report = None
    if weights:
        from moectl.evaluation.health import health

        with output.progress("reading", checkpoint.nbytes) as on_bytes:
            report = health(checkpoint, on_bytes)
    if json:
        output.emit_json("moectl.inspect/1", found.to_json() | ({"health": report.to_json()} if report else {}))
        return
    routing = f", {found.experts} experts" if found.experts else ""
    routing += f", top {found.top_k:g}" if found.experts and found.top_k else ""
    title = f"{found.name}: {found.model_type}, {found.layers} layers, hidden size {found.hidden_size}{routing}"
    columns = ("component", "tensors", "parameters", "active parameters", "bytes", "bits per parameter")
    rows: list[list[output.Cell]] = [
        [getattr(part, name.replace(" ", "_")) for name in columns] for part in found.components
    ]
    rows.append(["total", *(getattr(found, name.replace(" ", "_")) for name in columns[1:])])
    output.emit_table(columns, rows, title=title)
    if report is not None:
        layers = report.to_json()["layers"]
        names = list(layers[0]) if layers else ["layer"]
        output.emit_table(names, [[layer[name] for name in names] for layer in layers], title="Experts and routers")
        for name, count in report.nonfinite.items():
            output.warn(f"{name} holds {count} NaN or infinite values.")
