"""`moectl generate`: what a model writes after a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from moectl.cli import options
from moectl.cli.opening import opened


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write at most so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token every time.")
    ] = 0.0,
    device: options.Device = "auto",
    dtype: options.RunDtype = "auto",
    experts_implementation: Annotated[
        str | None,
        typer.Option(
            help="How experts run: eager, batched_mm, grouped_mm or moectl; moectl for coded ones when left out.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Have MODEL continue a prompt: the text goes to stdout as it comes, its speed and memory to stderr.

    Any checkpoint with a tokenizer will do, dense or not; a compressed one (`moectl compress qmoe`) runs as it is.
    """
    import sys
    from dataclasses import asdict

    from moectl.evaluation import generation
    from moectl.report import output

    text = sys.stdin.read() if prompt == "-" else prompt
    source = opened(model, revision)
    settings = generation.Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        experts=experts_implementation,
    )
    found = generation.generate(source, text, settings, (lambda _piece: None) if json else _show)
    if json:
        output.emit_json(
            "moectl.generate/1",
            {"model": source.name, "prompt": text, **asdict(found), "tokens_per_second": found.tokens_per_second},
        )
    else:
        _show("\n")
    first = f"{found.new_tokens} tokens after {found.prompt_tokens}: the first in {found.prompt_seconds:.2f} s"
    speed = "" if found.tokens_per_second is None else f", then {found.tokens_per_second:.1f} tokens/s"
    memory = "" if found.peak_bytes is None else f"; {output.size(found.peak_bytes)} of memory"
    output.note(f"{first}{speed}{memory}.", quiet=quiet)


def _show(text: str) -> None:
    """Write at once; on a terminal without what would drive it."""
    import sys

    from moectl.text import escape

    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" else escape(c) for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
