"""Options that mean the same in several commands, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moectl.cli import checks

_WHERE = "Directory, Hub id or hf://org/name@rev."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_WHERE)]
Dense = Annotated[str, typer.Argument(metavar="DENSE", help=_WHERE)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and warnings.")]

# ---- running a model ---------------------------------------------------------------------------------------

known_dtype = checks.one_of("--dtype", "auto", "float32", "bfloat16", "float16")

Device = Annotated[
    str, typer.Option(help="auto, cpu or cuda.", callback=checks.one_of("--device", "auto", "cpu", "cuda"))
]
RunDtype = Annotated[
    str,
    typer.Option(help="auto (float32 on a CPU, else as stored), float32, bfloat16 or float16.", callback=known_dtype),
]
ExpertsImplementation = Annotated[
    str | None, typer.Option(help="How experts run: eager, batched_mm, grouped_mm or moectl.", show_default=False)
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens a model sees at once; 1024, or what it can take, when left out.", show_default=False
    ),
]

# ---- pages -------------------------------------------------------------------------------------------------

Page = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a self-contained page.", show_default=False, callback=checks.file),
]
ReportPage = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write the report as a page.", show_default=False, callback=checks.file),
]

# ---- making a Mixture-of-Experts ---------------------------------------------------------------------------

Into = Annotated[str | None, typer.Option(help="MoE family to write; the family's default when left out.")]
MoeLayers = Annotated[str, typer.Option(help="MoE layers: all, every:2, last:6, or 0,3,5.")]
AuxLossCoef = Annotated[float, typer.Option(help="Load-balancing loss coefficient in the config.")]
