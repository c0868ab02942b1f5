"""`moectl verify`: is a checkpoint what its plan promised, and the function it came from?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options
from moectl.errors import CheckFailed, UsageError
from moectl.text import few

if TYPE_CHECKING:
    from moectl.checkpoint.source import Checkpoint
    from moectl.evaluation.compare import Comparison


def verify(
    model: options.Model,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also compare fp32 logits with this model.", show_default=False)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest allowed max|difference| / max|logit| with --against.")
    ] = 1e-5,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Random ids to compare; longer than any sliding window when left out.", show_default=False
        ),
    ] = None,
    seed: options.Seed = 0,
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Record the comparison in MODEL's README.md.")
    ] = False,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Re-hash every tensor of MODEL against its moectl.json; with --against, compare logits with another model.

    Exits with 5 if a hash differs or the difference is above --tolerance.
    """
    from moectl.checkpoint.provenance import verify_hashes
    from moectl.checkpoint.source import Checkpoint
    from moectl.report import output

    if write_card and against is None:
        raise UsageError(
            "--write-card needs --against.", "There is nothing to record otherwise.", "Name the dense model."
        )
    checkpoint = Checkpoint.open(model, revision)
    has_provenance = (checkpoint.path / "moectl.json").exists()
    document: dict[str, Any] = {"path": str(checkpoint.path)}
    rows: list[tuple[str, output.Cell]] = []
    failures: list[str] = []
    if has_provenance or against is None:
        with output.progress("hashing", checkpoint.nbytes, quiet=quiet) as on_bytes:
            hashes = verify_hashes(checkpoint, on_bytes)
        document["hashes"] = {**asdict(hashes), "ok": hashes.ok}
        rows += [("tensors hashed", hashes.tensors), ("bytes hashed", hashes.nbytes)]
        for kind in ("changed", "missing", "unexpected"):
            names = getattr(hashes, kind)
            rows.append((kind, len(names)))
            failures += [f"{kind}: {name}" for name in names]
    else:
        output.note(f"{checkpoint.name} has no moectl.json: hashes are not checked.", quiet=quiet)
    if against is not None:
        from moectl.evaluation.compare import compare

        comparison = compare(checkpoint, Checkpoint.open(against), tokens=tokens, seed=seed)
        measured = comparison.to_json()
        document["comparison"] = {"against": against, "tolerance": tolerance, **measured}
        rows += [(name.replace("_", " "), value) for name, value in measured.items()]
        if not comparison.relative <= tolerance:
            failures.append(f"relative difference {comparison.relative:.3g} is above the tolerance {tolerance:.3g}")
        if write_card:
            write_equivalence(checkpoint, against, comparison)
    document["ok"] = not failures
    if json:
        output.emit_json("moectl.verify/1", document)
    else:
        output.emit_table(("what", "value"), rows, title=f"{checkpoint.name}")
    if failures:
        raise CheckFailed(
            f"{checkpoint.path} is not what it should be: {few(failures)}.",
            "It was changed after it was made, or it is another function than the model it was compared with.",
            "Make it again from its source, or raise --tolerance if the difference is meant.",
        )


def write_equivalence(checkpoint: Checkpoint, against: str, comparison: Comparison) -> None:
    """Put the measured difference into the checkpoint's README.md, replacing what stood there."""
    from moectl.checkpoint.fs import FileSystem
    from moectl.checkpoint.journal import put
    from moectl.checkpoint.source import Checkpoint
    from moectl.upcycle.card import with_equivalence

    card = checkpoint.path / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {checkpoint.name}\n"
    measured = comparison.markdown(Checkpoint.open(against).name)
    put(FileSystem(), card, with_equivalence(text, measured).encode(), card.with_name(".README.md.new"))
