"""Which implementation the experts of a loaded model run on, ours among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moectl.errors import UsageError
from moectl.families.components import experts_and_top_k
from moectl.text import escape, reason, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_experts(model: PreTrainedModel, implementation: str, name: str) -> None:
    """Switch the experts of a model called `name` to an `--experts-implementation`; a dense model stays as it is.

    Raises:
        UsageError: there is no such implementation, or it cannot run this model.
    """
    if not experts_and_top_k(model.config.to_dict())[0]:
        return
    if implementation == "moectl":
        import moectl.integrations.transformers  # noqa: F401 - registers it
    try:
        model.set_experts_implementation(implementation)
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"--experts-implementation {shown(implementation)} cannot run {escape(name)}.",
            reason(error),
            "Give eager, batched_mm, grouped_mm or moectl, or leave it out.",
        ) from error


def set_ours(model: PreTrainedModel) -> None:
    """Have the experts of a model run on our kernels, where its family lets that be chosen."""
    if any("is_concatenated" in vars(module) for module in model.modules()):
        import moectl.integrations.transformers  # noqa: F401 - registers it

        model.set_experts_implementation("moectl")
