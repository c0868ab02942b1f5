"""Text that comes with Python: its standard library's code, its docstrings, and generated arithmetic.

It needs no network and no download, is large enough to train a small model (megabytes), and splits into three domains
that look nothing alike. Files come in the order of a hash of their path, so that any prefix is a fair sample of the
whole. The text is the same on every machine with the same Python; another Python brings another standard library.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from hashlib import sha256
from operator import add, mul, sub
from pathlib import Path

MIN_CHARS = 80
ARITHMETIC_DOCUMENTS = 4096
ARITHMETIC_LINES = 32
# Installed packages, tests, and sources that are tables (encodings, pydoc_data) or Python 2 (lib2to3).
_SKIPPED_DIRECTORIES = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
_OPERATIONS = {"+": add, "-": sub, "*": mul}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code() -> Iterator[str]:
    """Every top-level function and class of the standard library, without docstrings and comments."""
    for module in _modules():
        for node in module.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                _remove_docstrings(node)
                source = ast.unparse(node)
                if len(source) >= MIN_CHARS:
                    yield source + "\n"


def prose() -> Iterator[str]:
    """Every docstring of the standard library of at least 80 characters that is not mostly an interactive session."""
    for module in _modules():
        for node in ast.walk(module):
            docstring = _docstring(node)
            if docstring is None:
                continue
            text = inspect.cleandoc(docstring)
            lines = text.splitlines()
            prompts = sum(line.lstrip().startswith((">>>", "...")) for line in lines)
            if len(text) >= MIN_CHARS and prompts * 10 < len(lines):
                yield text + "\n"


def arithmetic() -> Iterator[str]:
    """Lines such as `347 + 58 = 405`: sums, differences and products of numbers of one to three digits."""
    numbers = random.Random(0)
    for _ in range(ARITHMETIC_DOCUMENTS):
        yield "".join(_equation(numbers) for _ in range(ARITHMETIC_LINES))


BUILTIN: dict[str, Callable[[], Iterator[str]]] = {"code": code, "prose": prose, "arithmetic": arithmetic}


def _equation(numbers: random.Random) -> str:
    sign = numbers.choice("+-*")
    left, right = (numbers.randrange(10 ** numbers.randint(1, 3)) for _ in range(2))
    return f"{left} {sign} {right} = {_OPERATIONS[sign](left, right)}\n"


def _modules() -> Iterator[ast.Module]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    for file in sorted(files, key=lambda file: sha256(file.relative_to(root).as_posix().encode()).digest()):
        yield ast.parse(file.read_bytes())


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, _Documented) and node.body and isinstance(node.body[0], ast.Expr):
        value = node.body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None


def _remove_docstrings(tree: ast.stmt) -> None:
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and _docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
