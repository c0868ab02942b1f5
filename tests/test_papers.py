"""docs/papers.csv keeps its word: every room exists, every command is one, and no paper that is named is missing."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from moectl.bench.peers import PEERS
from moectl.bench.routers import asked as measured
from moectl.bench.shapes import PRESETS
from moectl.cli.main import app
from moectl.compress.prune.recipe import METHODS as PRUNING
from moectl.errors import UsageError
from moectl.families.registry import MOE
from moectl.layerwise.routed import one_router
from moectl.routers.registry import ROUTERS
from moectl.routers.registry import find as find_router
from moectl.routers.spelling import Named
from moectl.routers.spelling import parse as parse_routers
from moectl.routing.answers import parse as parse_questions
from moectl.routing.whatif.machine import Machine
from moectl.routing.whatif.registry import WHAT_IFS
from moectl.routing.whatif.registry import find as find_what_if
from moectl.routing.whatif.replay import Settings
from moectl.upcycle.split_assign import METHODS as SPLITTING

Row = dict[str, str]
ROOT = Path(__file__).parents[1]
COLUMNS = ["title", "source", "what", "where", "run", "why_not"]
CITED = re.compile(r"(?<![\d.])\d\d(?:0[1-9]|1[0-2])\.\d{5}(?!\d)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9+.-]*(\.\w+)?")
REPLAYED = {"logits", "tokens", "tasks", "nothing"}
"""What a trace can tell a router."""


def papers() -> list[Row]:
    with (ROOT / "docs" / "papers.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def rooms(row: Row) -> list[str]:
    return row["where"].split(";") if row["where"] else []


def named(row: Row, kind: str) -> set[str]:
    """The routers or what-ifs among the rooms."""
    return {name for start, _, name in (room.partition(":") for room in rooms(row)) if start == kind}


def wrong_cells(row: Row) -> Iterator[str]:
    """What a reader would miss in a row."""
    if list(row) != COLUMNS or not all(isinstance(cell, str) for cell in row.values()):
        yield "has other columns"
        return
    yield from (f"has no {name}" for name in ("title", "source", "what") if not row[name])
    if bool(row["where"]) != bool(row["run"]):
        yield "has a room without a command, or a command without a room"
    if not row["where"] and not row["why_not"]:
        yield "neither lives here nor says why not"
    yield from (f"{name} is no sentence" for name in ("what", "why_not") if row[name] and not row[name].endswith("."))
    yield from (f"{name} breaks a table" for name, cell in row.items() if re.search(r"[|\n]|^\s|\s$", cell))


def wrong_rooms(row: Row) -> Iterator[str]:
    """Rooms that are not there."""
    for room in rooms(row):
        kind, _, name = room.partition(":")
        try:
            if kind == "router":
                find_router(name)
            elif kind == "what-if":
                find_what_if(name)
            elif not (ROOT / kind).exists():
                yield f"{kind} does not exist"
            elif name and name not in defined(ROOT / kind):
                yield f"{kind} defines no {name}"
        except UsageError as error:
            yield str(error)


@cache
def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def moectl() -> Any:
    """The program."""
    return get_command(app)


def understood(run: str) -> tuple[str, dict[str, Any]]:
    """The command that a line names and its parameters, as Typer reads them; nothing is run."""
    program, *words = shlex.split(run)
    command, path = moectl(), []
    while hasattr(command, "commands"):
        path.append(words.pop(0) if words else "")
        if program != "moectl" or path[-1] not in command.commands:
            raise UsageError(f"There is no command {' '.join([program, *path])}.", "", "")
        command = command.commands[path[-1]]
    return " ".join(path), command.make_context(path[-1], words).params


def chosen(given: dict[str, Any], path: str) -> list[Named]:
    """The routers of a command, with options that they have, each one that the command can take."""
    found = []
    if path == "bench routers":
        found = measured(given["router"])
    elif given.get("router") and path != "upcycle split":
        found = [one_router(given["router"])]
        found[0].options()
    for each in parse_routers(given["replay"]) if given.get("replay") else []:
        if each.entry.kind != "router" or not REPLAYED.issuperset(each.entry.needs):
            raise UsageError(f"{each.entry.name} cannot be replayed.", "", "")
        own = {field.name for field in fields(Settings)}
        Named(each.entry, {key: text for key, text in each.given.items() if key not in own}).options()
        found.append(each)
    return found


def wrong_run(row: Row) -> Iterator[str]:
    """What of a command line is not so: command, options, and the names in their values."""
    if not row["run"]:
        return
    try:
        path, given = understood(row["run"])
        routers = {each.entry.name for each in chosen(given, path)}
        if path == "routers":
            routers |= {find_router(given["name"]).name}
        questions = parse_questions(None, given.get("what_if") or (), Machine(8, 80.0, 50.0)).what_ifs
    except typer.TyperException as error:
        yield error.format_message() if hasattr(error, "format_message") else str(error)
        return
    except UsageError as error:
        yield str(error)
        return
    if strange := routers - named(row, "router"):
        yield f"runs {', '.join(strange)}, which is no room of it"
    if strange := {each.name for each, _ in questions} - named(row, "what-if"):
        yield f"asks {', '.join(strange)}, which is no room of it"
    known = {
        "into": set(MOE),
        "method": set(PRUNING if path == "compress prune" else SPLITTING),
        "backend": {*PEERS, "all"},
        "models": set(PRESETS),
    }
    for option, names in known.items():
        words = given.get(option) or ()
        for word in words.split(",") if isinstance(words, str) else words:
            if word not in names and not PLACEHOLDER.fullmatch(word):
                yield f"there is no {option} {word}"


def missing(cited: dict[str, set[str]], rows: list[Row]) -> Iterator[str]:
    """Papers that something names, and no row has."""
    sources = {source for row in rows for source in row["source"].split(";")}
    yield from (f"{paper}, of {where}" for where, some in cited.items() for paper in sorted(some - sources))


def cited() -> dict[str, set[str]]:
    """The arXiv ids in what the project says of itself, by file."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    files += [path for folder in ("moectl", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): set(CITED.findall(path.read_text())) for path in files}
    return {name: ids for name, ids in found.items() if ids and name != "docs/papers.md"}


def wrong(row: Row) -> list[str]:
    return [*wrong_cells(row), *wrong_rooms(row), *wrong_run(row)]


def test_every_row_is_whole_and_true() -> None:
    assert {row["title"]: found for row in papers() if (found := wrong(row))} == {}


def test_no_paper_stands_twice() -> None:
    for column in ("source", "title"):
        cells = [cell.casefold() for row in papers() for cell in row[column].split(";")]
        assert len(cells) == len(set(cells)), column


@pytest.mark.parametrize(("kind", "entries"), [("router", ROUTERS), ("what-if", WHAT_IFS)])
def test_the_papers_of_every_router_and_what_if_name_it(kind: str, entries: tuple[Any, ...]) -> None:
    rows = {source: row for row in papers() for source in row["source"].split(";")}
    pairs = [(entry.name, paper) for entry in entries for paper in entry.papers]
    assert [(name, paper) for name, paper in pairs if name not in named(rows.get(paper, {"where": ""}), kind)] == []


def test_every_paper_that_is_cited_has_a_row() -> None:
    found = cited()
    assert {"README.md", "docs/compress.md", "moectl/routers/switch.py"} <= set(found), "where papers are cited"
    assert list(missing(found, papers())) == []


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("where", "router:nobodys", "no router 'nobodys'"),
        ("where", "what-if:nothing", "no what-if 'nothing'"),
        ("where", "router:switch;moectl/routers/swich.py", "moectl/routers/swich.py does not exist"),
        ("where", "router:switch;moectl/routers/switch.py:Swich", "defines no Swich"),
        ("where", "", "command without a room"),
        ("where", "moectl/routers/switch.py", "runs switch, which is no room"),
        ("run", "", "room without a command"),
        ("run", "moectl trian MODEL", "no command moectl trian"),
        ("run", "other train MODEL", "no command other train"),
        ("run", "moectl train MODEL --data FILE --out OUT --rooter switch", "No such option: --rooter"),
        ("run", "moectl train MODEL --data FILE -o OUT --steps many", "not a valid int"),
        ("run", "moectl train MODEL --router switch -o OUT", "data"),
        ("run", "moectl train MODEL --data FILE -o OUT --router swich", "no router 'swich'"),
        ("run", "moectl train MODEL --data FILE -o OUT --router switch:speed=1", "no option speed"),
        ("run", "moectl train MODEL --data FILE -o OUT --router mot", "cannot be put into a model"),
        ("run", "moectl analyze-routing TRACE --replay x-moe", "x-moe cannot be replayed"),
        ("run", "moectl analyze-routing TRACE --replay switch,mot", "mot cannot be replayed"),
        ("run", "moectl analyze-routing TRACE --replay switch:cost=1", "no option cost"),
        ("run", "moectl analyze-routing TRACE --what-if cash", "no what-if 'cash'"),
        ("run", "moectl analyze-routing TRACE --what-if cache:price=1", "no option price"),
        ("run", "moectl analyze-routing TRACE --what-if cache", "asks cache, which is no room"),
        ("run", "moectl compress prune MODEL -o OUT --method cut", "no method cut"),
        ("run", "moectl upcycle sparse DENSE -o OUT --into mixtrall", "no into mixtrall"),
        ("run", "moectl bench layer qwen4-1t --backend moectl,fastest", "no backend fastest"),
        ("run", "moectl bench routers --router mot", "mot cannot be measured"),
        ("what", "No full stop", "what is no sentence"),
        ("why_not", "One | two.", "breaks a table"),
    ],
)
def test_planted_errors_are_found(column: str, cell: str, said: str) -> None:
    row = next(row for row in papers() if row["source"] == "2101.03961")
    assert wrong(row) == [] and any(said in found for found in wrong({**row, column: cell}))


def test_a_paper_without_a_row_is_found() -> None:
    rows = papers()
    without = [row for row in rows if row["source"] != "2101.03961"]
    assert any(found.startswith("2101.03961, of moectl/routers/switch.py") for found in missing(cited(), without))
    assert list(missing({"a.py": set(CITED.findall("(arXiv 2401.99999, 3.14159, 1234.56789)"))}, rows)) == [
        "2401.99999, of a.py"
    ]
