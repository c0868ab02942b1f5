"""The `moectl` program: the commands, and how every kind of failure ends.

Exit codes: 0 done, 1 a bug in moectl, 2 usage (also: the output exists), 3 the input cannot be used,
4 the machine or network cannot do it, 5 a check failed, 130/143 interrupted, 141 the reader of a pipe left.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import typer

from moectl.cli import (
    analyze_routing,
    average,
    bench,
    branch,
    compress,
    decompress,
    families,
    finish,
    generate,
    inspect,
    quickstart,
    recipe,
    routers,
    train,
    upcycle,
    verify,
)
from moectl.cli import eval as eval_
from moectl.errors import MachineError, MoectlError

app = typer.Typer(
    name="moectl",
    help="Make Mixture-of-Experts checkpoints, check them, and look inside.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(upcycle.app, name="upcycle")
app.add_typer(compress.app, name="compress")
app.add_typer(bench.app, name="bench")
app.add_typer(recipe.app, name="recipe")
app.command("decompress")(decompress.decompress)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)
app.command("finish")(finish.finish)
app.command("inspect")(inspect.inspect)
app.command("eval")(eval_.evaluate)
app.command("analyze-routing")(analyze_routing.analyze_routing)
app.command("average")(average.average)
app.command("families")(families.families)
app.command("routers")(routers.routers)
app.command("train")(train.train)
app.command("branch")(branch.branch)
app.command("quickstart")(quickstart.quickstart)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Make Mixture-of-Experts checkpoints, check them, and look inside."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"moectl {installed('moectl')}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the program and end it with the exit code of the contract."""
    _open_closed_streams()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except MoectlError as error:
        if lines := error.lines():
            _complain(lines)
        code = error.exit_code
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        code = 130
    except MemoryError:
        code = _lacks_memory()
    except OSError as error:
        what = error.strerror or str(error)
        _complain([f"{error.filename}: {what}" if error.filename else what, "The machine could not do it."])
        code = MachineError.exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            _complain([stop.code])
        if isinstance(stop.__context__, BrokenPipeError):  # Typer ends a broken pipe with 1
            code = 141
    except BaseException as error:
        # torch has no type of its own for a CPU without memory.
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            code = _lacks_memory()
        else:
            _report_bug()
            code = 1
    if code in (130, 143):
        _complain(["Interrupted. If an output was begun it is kept, and the same command resumes it."])
    _leave(code)


def _open_closed_streams() -> None:
    """Give a closed stdin, stdout or stderr to /dev/null, lest the first file opened become one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def _complain(lines: list[str]) -> None:
    """Write an error to stderr, each part on one line; a stderr that is gone is left to `_leave`."""
    from moectl.text import escape

    first, *rest = [escape(line) for line in lines if line]
    with suppress(OSError):
        print("\n  ".join(["error: " + first, *rest]), file=sys.stderr)  # noqa: T201


def _lacks_memory() -> int:
    _complain(["The machine is out of memory.", "", "Use a machine with more, or close other programs."])
    return MachineError.exit_code


def _report_bug() -> None:
    import traceback

    from moectl.report.output import escape_lines

    with suppress(OSError):
        sys.stderr.write(escape_lines(traceback.format_exc()))
    _complain(
        [
            "This is a bug in moectl, not in what you gave it.",
            "The lines above say where it happened.",
            "Please report it to the project's issue tracker with those lines and the command.",
        ]
    )


def _leave(code: int) -> NoReturn:
    """Flush and end. What cannot be flushed is let go, or the interpreter would retry and exit with 120."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            code = 141
        except OSError:
            code = code or MachineError.exit_code
        else:
            continue
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    raise SystemExit(code)
