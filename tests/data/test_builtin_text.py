"""The built-in text is there on every supported Python: three domains, megabytes of two, the same each time."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import islice
from operator import add, mul, sub

import pytest

from moectl.data import builtin
from moectl.data.builtin import BUILTIN, arithmetic, code, prose
from moectl.data.documents import split_of


@pytest.mark.parametrize("name", BUILTIN)
def test_text_is_the_same_each_time(name: str) -> None:
    assert list(islice(BUILTIN[name](), 100)) == list(islice(BUILTIN[name](), 100))


@pytest.mark.parametrize("name", ["code", "prose"])
def test_there_is_a_megabyte_of_code_and_of_prose(name: str) -> None:
    size, texts = 0, []
    for text in BUILTIN[name]():
        texts.append(text)
        size += len(text.encode())
        if size > 1_000_000:
            break
    assert size > 1_000_000
    assert min(map(len, texts)) > builtin.MIN_CHARS
    heldout = [text for text in texts if split_of(text) == "heldout"]
    assert 0.06 < len(heldout) / len(texts) < 0.15


def test_code_has_neither_docstrings_nor_comments() -> None:
    for text in islice(code(), 300):
        (definition,) = ast.parse(text).body
        assert isinstance(definition, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(definition):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None
        assert text == ast.unparse(definition) + "\n", "nothing that the syntax tree does not hold, so no comment"


def test_prose_is_words_rather_than_sessions() -> None:
    texts = list(islice(prose(), 500))
    lines = "".join(texts).splitlines()
    assert sum(line.lstrip().startswith(">>>") for line in lines) < 0.02 * len(lines)
    letters = sum(character.isalpha() or character.isspace() for text in texts for character in text)
    assert letters > 0.85 * sum(map(len, texts))


def test_arithmetic_is_right() -> None:
    operations = {"+": add, "-": sub, "*": mul}
    for text in islice(arithmetic(), 100):
        for line in text.splitlines():
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", line).groups()  # type: ignore[union-attr]
            assert operations[sign](int(left), int(right)) == int(result)


def test_built_in_text_is_read_without_a_library() -> None:
    """A spec is resolved and read in a process where only the standard library can be imported."""
    program = (
        "import sys; from moectl.data.documents import read_documents\n"
        "for document, _ in zip(read_documents(['builtin:code', 'builtin:prose']), range(20)): pass\n"
        "heavy = {'numpy', 'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=300)
