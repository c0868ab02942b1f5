"""`moectl families`: what can become what, and what cannot and why; what runs on our kernels."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options

Backend = Annotated[
    bool, typer.Option("--backend", help="List instead which MoE families of transformers run on our expert kernels.")
]


def families(backend: Backend = False, json: options.Json = False) -> None:
    """List the dense families, the MoE families they become, and the pairs that are refused with the reason."""
    if backend:
        _backend(json)
        return
    from moectl.families.listing import listing, refusals
    from moectl.report import output

    pairs, refused = listing(), refusals()
    if json:
        output.emit_json("moectl.families/1", {"pairs": pairs, "refused": refused})
        return
    output.emit_table(list(pairs[0]), [list(row.values()) for row in pairs], title="Pairs")
    output.emit_table(list(refused[0]), [list(row.values()) for row in refused], title="Refused")


def _backend(json: bool) -> None:
    from moectl.families.backend import backend_rows, transformers_version
    from moectl.report import output

    rows, version = backend_rows(), transformers_version()
    if json:
        output.emit_json("moectl.families.backend/1", {"transformers": version, "experts": rows})
        return
    title = f'experts_implementation="moectl" with transformers {version}'
    output.emit_table(list(rows[0]), [list(row.values()) for row in rows], title=title)
    kinds = [row["backend"] for row in rows]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("fused", "unfused", "refused"))
    output.note(f"transformers {version}: {counts}")
