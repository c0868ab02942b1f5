"""Tasks of the lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.5371628), for models that moectl has loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from moectl.errors import MachineError, UsageError
from moectl.text import escape, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_harness() -> tuple[Any, Any, Any]:
    """The harness's `simple_evaluate`, `TaskManager` and `HFLM`, or what to do to have them.

    Raises:
        MachineError: it is not installed, or something it needs is not.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MachineError(
            f"--tasks needs the lm-evaluation-harness, which is not installed ({escape(str(error))[:120]}).",
            "It has the tasks, their prompts and their scoring.",
            "pip install 'moectl[eval]', or give --data to measure the loss alone.",
        ) from None
    return simple_evaluate, TaskManager, HFLM


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], *, limit: int | None, seed: int, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """For each task (and each subtask of a group), its metrics by name, such as `acc` and `acc_stderr`.

    Args:
        limit: examples per task; all when None.

    Raises:
        MachineError: the harness is not installed.
        UsageError: it does not know a task.
    """
    simple_evaluate, task_manager, language_model = require_harness()
    manager = task_manager()
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"The harness has no task {', '.join(shown(task) for task in unknown)}.", "", "See lm_eval --tasks list."
        )
    with redirect_stdout(sys.stderr):  # stdout is the report's
        found = simple_evaluate(
            model=language_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in measured.items()
            if "," in metric and isinstance(value, int | float)  # METRIC,FILTER; others are not measured
        }
        for task, measured in found["results"].items()
    }
