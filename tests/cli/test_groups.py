"""A dataclass among a command's parameters is its fields on the command line, in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from moectl.cli.groups import grouped
from moectl.errors import UsageError


@dataclass(frozen=True)
class Plate:
    """Two options, and two fields that are none."""

    size: Annotated[int, typer.Option(help="Of the plate.")] = 3
    colour: Annotated[str, typer.Option("--paint", help="Of the plate.")] = "blue"
    age: int = field(default=7, init=False)
    marks: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError("no such plate")


@dataclass(frozen=True)
class Saucer(Plate):
    """The same with another default and an option less."""

    size: Annotated[int, typer.Option(help="Of the plate.")] = 1
    colour: str = field(default="white", init=False)


def served(*arguments: str, plate: type = Plate) -> tuple[object, ...]:
    """What a command between whose own options a group stands is called with."""
    told: list[tuple[object, ...]] = []

    def serve(first: str, *, plate: Plate, last: bool = False) -> None:
        """Serve."""
        told.append((first, plate, last))

    serve.__annotations__["plate"] = plate.__name__
    app = typer.Typer()
    app.command()(grouped(serve))
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    return told[0]


def test_the_fields_stand_where_the_group_stood() -> None:
    def serve(first: str, *, plate: Plate, last: bool = False) -> None:
        """Serve."""

    command = grouped(serve)
    assert list(signature(command).parameters) == ["first", "size", "colour", "last"]
    assert command.__doc__ == "Serve."


def test_values_and_defaults_arrive_in_the_group() -> None:
    assert served("it") == ("it", Plate(), False)
    assert served("it", "--size", "5", "--paint", "red", "--last") == ("it", Plate(5, "red"), True)


def test_a_derived_group_has_its_own_defaults_and_fewer_options() -> None:
    assert served("it", plate=Saucer) == ("it", Saucer(1), False)
    with pytest.raises(IndexError):  # it has no such option
        served("it", "--paint", "red", plate=Saucer)


def test_what_a_group_refuses_is_refused_before_the_command() -> None:
    with pytest.raises(UsageError, match="no such plate"):
        served("it", "--size", "-1")
