"""`moectl eval`: how well models predict held-out text, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli import options
from moectl.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from moectl.evaluation.run import Evaluation


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Directories, Hub ids or hf://org/name@rev; the first is the one others are compared with.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text: a file, a directory, a Hub dataset; built-in text when left out. Repeatable.",
            show_default=False,
        ),
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Also the BTM ensemble of the dense models, uniform and by posterior.")
    ] = False,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A member of the ensemble, one of the MODELs, in place of all dense ones; repeatable.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of the lm-evaluation-harness, as arc_easy,piqa (needs moectl[eval]).", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task.", show_default=False)] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 5 if true of a model: 'loss>2.0', 'code.difference>0.05'.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per domain, as the first model counts.")] = 32768,
    seq_len: options.SeqLen = None,
    device: options.Device = "auto",
    dtype: options.RunDtype = "auto",
    experts_implementation: options.ExpertsImplementation = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure loss, perplexity and bits per byte on held-out text, domain by domain, with 95 % bootstrap intervals.

    Every token of a document is predicted once, the first from the beginning-of-text (or end-of-text) token. The loss
    is in nats per token of the model's own tokenizer; bits per byte compare models of any tokenizer. The difference is
    in bits per byte, against the first model, paired by document.
    """
    from moectl.data.documents import EVERY_BUILTIN
    from moectl.evaluation import gate
    from moectl.evaluation.harness import require_harness
    from moectl.report import output

    conditions = [gate.parse(text) for text in fail_on or ()]
    wanted = tuple(task.strip() for task in tasks.split(",") if task.strip()) if tasks is not None else ()
    if tasks is not None:
        require_harness()
    measured_text = data is not None or not wanted
    if not measured_text and (conditions or ensemble or member):
        raise UsageError(
            "--fail-on, --ensemble and --member are about held-out text, and only --tasks are measured.",
            "",
            "Give --data too.",
        )
    from moectl.evaluation.run import Settings, run

    settings = Settings(
        models=tuple(models),
        data=tuple(data or EVERY_BUILTIN) if measured_text else (),
        ensemble=ensemble or bool(member),
        members=tuple(member or ()),
        tasks=wanted,
        limit=limit,
        max_tokens=max_tokens,
        sequence_length=seq_len,
        device=device,
        dtype=dtype,
        experts_implementation=experts_implementation,
        seed=seed,
        revision=revision,
    )
    found = run(settings, say=lambda text: output.note(text, quiet=quiet))
    if json:
        output.emit_json("moectl.eval/1", found.to_json())
    else:
        columns, rows = _table(found)
        output.emit_table(columns, rows, title="Held-out text" if measured_text else "Tasks")
    failures = [line for condition in conditions for line in gate.failures(condition, found.names, found.results)]
    if failures:
        raise CheckFailed(
            "; ".join(failures) + ".", "--fail-on says so.", "Look at the table, or change the condition."
        )


def _table(found: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Rows are domains and measures, columns models."""
    rows: list[list[Any]] = []
    for domain in found.results[0] if found.results else ():
        of_models = [of_model[domain] for of_model in found.results]
        for measure in ("loss", "perplexity", "bits_per_byte", "difference"):
            rows.append([domain, measure, *(getattr(each, measure) for each in of_models)])
            if measure != "perplexity" and of_models[0].loss_interval is not None:
                intervals = [getattr(each, f"{measure}_interval") for each in of_models]
                rows.append([domain, f"{measure} low", *(low for low, _high in intervals)])
                rows.append([domain, f"{measure} high", *(high for _low, high in intervals)])
    measured = dict.fromkeys((name, metric) for each in found.tasks for name in each for metric in each[name])
    for task, metric in measured:
        values = [each.get(task, {}).get(metric) for each in found.tasks]
        rows.append([task, metric, *values, *[None] * (len(found.names) - len(values))])
    return ["domain", "measure", *found.names], rows
