"""What the commands of `moectl bench` share: their options, the settings these make, and what is done with a result."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import checks, options
from moectl.errors import UsageError

if TYPE_CHECKING:
    from moectl.bench.sweep import Settings

Dtype = Annotated[
    str | None, typer.Option(help="float32 (fp32), bfloat16 (bf16), float16 (fp16), float64; several with commas.")
]
Routing = Annotated[str, typer.Option(help="uniform, balanced, zipf:EXPONENT, hot:SHARE or trace:FILE.")]
TpSize = Annotated[int, typer.Option(min=1, help="Divide the expert width, as tensor parallelism does.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU.", show_default=False)]
Time = Annotated[float, typer.Option(min=0.001, help="Seconds to measure each row for, about.")]


@dataclass(frozen=True, slots=True)
class Layers:
    """The expert layers to measure, and how many tokens they are given."""

    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Presets (qwen3-30b-a3b, ...), directories, config.json files or Hub ids."
        ),
    ] = None
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="d,f,E,k", help="A shape written out; repeatable.")
    ] = None
    tokens: Annotated[str | None, typer.Option(help="Tokens per call, as 1,16,128.", show_default=False)] = None


@dataclass(frozen=True, slots=True)
class Timing:
    """On what, and how, they are measured."""

    device: options.Device = "auto"
    threads: Threads = None
    clock: Annotated[
        str, typer.Option(help="wall; or cpu, the CPU time of one thread, on a machine shared with others.")
    ] = "wall"
    time: Time = 0.5
    seed: options.Seed = 0
    revision: options.Revision = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where a result goes, and what it is compared with: looked at before minutes of measuring.

    Raises:
        InputError: the baseline is no result.
        UsageError: --fail-slower without a baseline, or not a share.
    """

    json: options.Json = False
    html: options.Page = None
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            metavar="FILE",
            help="Also write the JSON document.",
            show_default=False,
            callback=checks.file,
        ),
    ] = None
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An older result to compare with.", show_default=False)
    ] = None
    fail_slower: Annotated[
        str | None,
        typer.Option(metavar="5%", help="Exit with 5 if a row is slower than in --baseline by more than this."),
    ] = None
    quiet: options.Quiet = False

    def __post_init__(self) -> None:
        from moectl.bench.baseline import parse_limit, read

        if self.fail_slower is not None and self.baseline is None:
            raise UsageError(
                "--fail-slower needs --baseline.", "There is nothing to compare with.", "Give an older result."
            )
        if self.baseline is not None:
            read(self.baseline)
        if self.fail_slower is not None:
            parse_limit(self.fail_slower)

    def announce(self, title: str) -> None:
        """Say on a terminal what is being measured."""
        from moectl.report import output

        output.note(f"measuring {title}", quiet=self.quiet or not sys.stderr.isatty())

    def keep(self, document: dict[str, Any]) -> None:
        """Write --output while there is more to measure, so that a run that is stopped leaves what it has."""
        from moectl.bench.baseline import SCHEMA
        from moectl.report import html, output

        if self.output is not None:
            html.write(self.output, output.json_text(SCHEMA, document | _told(document)))

    def hand_over(self, document: dict[str, Any]) -> None:
        """The result on stdout and into the files that were asked for, and how it compares with --baseline.

        Raises:
            CheckFailed: a row is slower by more than --fail-slower.
        """
        from moectl.bench import page, tables
        from moectl.bench.baseline import SCHEMA
        from moectl.report import html as pages
        from moectl.report import output

        document |= _told(document)
        if self.output is not None:
            pages.write(self.output, output.json_text(SCHEMA, document))
        if self.html is not None:
            pages.write(self.html, page.render(document))
        if self.json:
            output.emit_json(SCHEMA, document)
        elif sys.stdout.isatty():
            for title, columns, rows in tables.short(document):
                output.emit_table(columns, rows, title)
        else:
            output.emit_table(*tables.full(document))
        output.note(document["finding"] + ".", quiet=self.quiet)
        for reason in tables.missing(document):
            if reason.startswith(("moectl:", "moectl at ")):
                output.warn(f"not measured: {reason}")
            else:
                output.note("  " + reason, quiet=self.quiet or not sys.stderr.isatty())
        self._compare(document)

    def _compare(self, document: dict[str, Any]) -> None:
        from moectl.bench.baseline import compare, parse_limit, read
        from moectl.report import output

        if self.baseline is None:
            return
        found = compare(document, read(self.baseline))
        for name, ratio in found.ratios.items():
            output.note(f"{name}: {ratio:.3g} of the time in the baseline", quiet=self.quiet)
        for name in found.gone:
            output.warn(f"{name} is in the baseline and was not measured now.")
        for name in found.new:
            output.note(f"{name} is not in the baseline.", quiet=self.quiet)
        if self.fail_slower is not None:
            found.require(parse_limit(self.fail_slower))


def settings_of(
    layers: Layers,
    timing: Timing,
    dtype: str | None,
    routing: str = "uniform",
    tp_size: int = 1,
    *,
    presets: list[str] | None = None,
    counts: str | None = None,
) -> Settings:
    """What is to be measured; the defaults depend on the device. `presets` are those of a GPU."""
    from moectl.bench import device as machine
    from moectl.bench.shapes import choose
    from moectl.bench.sweep import Settings

    choices("--clock", timing.clock, ("wall", "cpu"))
    kind = machine.pick(timing.device).type
    models, shapes = layers.models or [], layers.shape or []
    if not models and not shapes:
        models, shapes = (presets or ["qwen3-30b-a3b"], []) if kind == "cuda" else ([], ["512,256,32,4"])
    tokens = layers.tokens or counts or ("1,16,128,4096,32768" if kind == "cuda" else "1,16,128")
    return Settings(
        choose(models, shapes, tp_size, timing.revision),
        _counts(tokens),
        what=["fwd"],
        dtypes=dtypes_of(dtype, kind),
        backends=[],
        routing=routing,
        device=timing.device,
        threads=timing.threads,
        seed=timing.seed,
        clock=timing.clock,
        seconds=timing.time,
    )


def dtypes_of(text: str | None, kind: str) -> list[str]:
    """Names of dtypes, from short ones too; the default depends on the kind of device."""
    from moectl.bench.device import DTYPES, SHORT

    words = [word.strip() for word in (text or ("bfloat16" if kind == "cuda" else "float32")).split(",")]
    return choices("--dtype", ",".join(SHORT.get(word, word) for word in words), tuple(DTYPES))


def choices(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """The words of an option with commas.

    Raises:
        UsageError: one of them is not among those that there are.
    """
    from moectl.text import shown

    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    unknown = [word for word in words if word not in allowed]
    if unknown:
        raise UsageError(f"{option} {shown(', '.join(unknown))} is unknown.", "", f"There are {', '.join(allowed)}.")
    return words


def _counts(text: str) -> list[int]:
    from moectl.text import shown

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise UsageError(f"--tokens {shown(text)} is not a list of counts.", "", "Write 1,16,128.")
    return list(dict.fromkeys(int(word) for word in words))


def export_choices(settings: Settings, export: tuple[str, Path], quiet: bool) -> None:
    """Write --export's files.

    Raises:
        MachineError: there is no CUDA device.
    """
    import torch

    from moe_kernels import target
    from moectl.bench import device as machine
    from moectl.bench import tune
    from moectl.errors import MachineError
    from moectl.report import output

    engine, folder = export
    choices("--export", engine, ("vllm",))
    device = machine.pick(settings.device)
    if device.type != "cuda":
        raise MachineError("--export needs a CUDA device.", "The choices are for one kind of GPU.", "Leave it out.")
    where = target.of(torch.empty(0, device=device))
    for shape in settings.shapes:
        path = tune.export_vllm(shape, where, folder)
        output.note(f"vLLM finds {path} with VLLM_TUNED_CONFIG_FOLDER={folder}.", quiet=quiet)


def _told(document: dict[str, Any]) -> dict[str, str]:
    """The command, and what came of it in one sentence."""
    import shlex

    from moectl.bench import tables

    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return {"command": shlex.join(["moectl", *words]), "finding": tables.finding(document)}


def read_text(path: Path) -> str:
    """Raises InputError if the file cannot be read."""
    from moectl.errors import InputError
    from moectl.text import shown

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(str(path))} cannot be read: {shown(str(error))}.", "", "Check the path.") from error
