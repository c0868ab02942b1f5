"""Options that several commands share, as one parameter: a dataclass that stands for its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer is to see it: in place of each parameter that is a dataclass, the fields that it is made of.

    The fields are annotated as parameters of a command are, and their defaults are the options' defaults.
    """
    given = signature(command, eval_str=True).parameters
    groups: dict[str, type] = {
        name: parameter.annotation
        for name, parameter in given.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }
    fields = {name: signature(group, eval_str=True).parameters for name, group in groups.items()}
    shown = [each for name, parameter in given.items() for each in fields.get(name, {name: parameter}).values()]

    @wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields[name]})
        command(**values)

    flat.__signature__ = Signature([each.replace(kind=Parameter.KEYWORD_ONLY) for each in shown])  # type: ignore[attr-defined]
    return flat
