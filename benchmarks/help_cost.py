"""What `moectl ... --help` costs above Typer itself, in CPU time.

The yardstick is generated from the commands: one module with the same signatures and help texts, no bodies,
and so the same pages. Runs of the two alternate, and the least user + system time of each counts.

    python benchmarks/help_cost.py
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import typer
from machine import command, machine, run

import moectl.cli
from moectl.cli.main import app

RESULTS = Path(__file__).parent / "results" / "help_cost.json"
ALLOWED_RATIO = 1.10
COMMANDS_NAME = "moectl.cli"
COMMANDS = Path(moectl.cli.__file__).parent


def main() -> None:
    """Measure every help page, print a table and write it as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its byte code cached
    pages = ["", *leaf_commands(app)]
    with tempfile.TemporaryDirectory() as folder:
        ours = [str(Path(sys.executable).with_name("moectl"))]
        least = measure(pages, ours, bare_program(Path(folder)), runs)
    rows = [
        {
            "command": " ".join(["moectl", *page.split(), "--help"]),
            "moectl_ms": round(1000 * seconds, 1),
            "bare_ms": round(1000 * bare_seconds, 1),
            "ratio": round(seconds / bare_seconds, 3),
        }
        for page, (seconds, bare_seconds) in zip(pages, least, strict=True)
    ]
    document = {
        "schema": "moectl.help_cost/1",
        "command": command(),
        "machine": {**machine(), "typer": version("typer")},
        "measure": "user + system CPU time, least of the runs, alternating",
        "allowed_ratio": ALLOWED_RATIO,
        "worst_ratio": max(round(seconds / bare_seconds, 3) for seconds, bare_seconds in least),
        "rows": rows,
    }
    for row in rows:
        print("{command:32} {moectl_ms:6} ms   bare {bare_ms:6} ms   ratio {ratio}".format(**row))
    print(f"worst ratio {document['worst_ratio']}, allowed {ALLOWED_RATIO}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


def leaf_commands(group: typer.Typer, *path: str) -> Iterator[str]:
    """The commands that do something, as typed after `moectl`."""
    for leaf in group.registered_commands:
        yield " ".join([*path, leaf.name or ""])
    for child in group.registered_groups:
        assert child.typer_instance
        yield from leaf_commands(child.typer_instance, *path, child.name or "")


def measure(pages: list[str], ours: list[str], bare: list[str], runs: int) -> list[tuple[float, float]]:
    """Least CPU seconds of both programs for each page, once they are known to print the same."""
    helps = [([*ours, *page.split(), "--help"], [*bare, *page.split(), "--help"]) for page in pages]
    for our_help, bare_help in helps:
        assert run(our_help).stdout == run(bare_help).stdout, our_help
    least = [(math.inf, math.inf)] * len(pages)
    for _ in range(runs):
        for i, (our_help, bare_help) in enumerate(helps):
            least[i] = (min(least[i][0], run(our_help).cpu), min(least[i][1], run(bare_help).cpu))
    return least


def bare_program(folder: Path) -> list[str]:
    """Write the yardstick into `folder` and return how to run it: as a console script runs a module."""
    program = ast.fix_missing_locations(ast.Module(bare_module(), []))
    (folder / "bare.py").write_text(ast.unparse(program))
    script = folder / "moectl"
    script.write_text("import sys\nfrom bare import main_app\nsys.exit(main_app())\n")
    return [sys.executable, str(script)]


def bare_module() -> list[ast.stmt]:
    """The command modules in one, without bodies and without what only bodies needed."""
    statements = list(flattened("main", set()))
    while True:
        used = {node.id for s in statements for node in ast.walk(s) if isinstance(node, ast.Name)}
        kept = [s for s in statements if needed(s, used)]
        if len(kept) == len(statements):
            return [*ast.parse("from __future__ import annotations").body, *kept]
        statements = kept


def needed(statement: ast.stmt, used: set[str]) -> bool:
    """Whether a statement runs at import for its own sake, or one that does uses what it defines."""
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return any((alias.asname or alias.name) in used for alias in names)
        case ast.FunctionDef(name=name, decorator_list=[]):
            return name in used
    return True


def flattened(module: str, done: set[str]) -> Iterator[ast.stmt]:
    """Statements of `moectl.cli.MODULE` after its siblings', with names made MODULE_name."""
    done.add(module)
    body = ast.parse((COMMANDS / f"{module}.py").read_text()).body
    siblings = {a.name for s in body if isinstance(s, ast.ImportFrom) and s.module == COMMANDS_NAME for a in s.names}
    for sibling in sorted(siblings):
        if sibling not in done:
            yield from flattened(sibling, done)
    own = {target.id for s in body if isinstance(s, ast.Assign) for target in s.targets if isinstance(target, ast.Name)}
    own |= {s.name for s in body if isinstance(s, ast.FunctionDef | ast.ClassDef)}
    rename = Flatten(module, own, siblings)
    for statement in body:
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__") | ast.If():
                continue
            case ast.ImportFrom(module=package) if package == COMMANDS_NAME:
                continue
        yield rename.visit(statement)


class Flatten(ast.NodeTransformer):
    """Give one module's names the module's prefix, and empty its functions."""

    def __init__(self, module: str, own: set[str], siblings: set[str]) -> None:
        self.module, self.own, self.siblings = module, own, siblings

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{self.module}_{node.id}", node.ctx) if node.id in self.own else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.siblings:
            return ast.Name(f"{node.value.id}_{node.attr}", node.ctx)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        help_text = ast.get_docstring(node, clean=False)
        node.body = [ast.Expr(ast.Constant(help_text)) if help_text else ast.Pass()]
        node.name = f"{self.module}_{node.name}"
        self.generic_visit(node)
        return node


if __name__ == "__main__":
    main()
