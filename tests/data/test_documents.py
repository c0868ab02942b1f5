"""`--data` means the same documents, domains and split whatever the format, the order or the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.data.builtin import BUILTIN
from moectl.data.documents import Document, read_documents, split_of
from moectl.errors import InputError, MachineError

TEXTS = [f"Document {number}:\r\n\n  naïve “quotes”, a tab\t and 🦉.\n" for number in range(60)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "tales.jsonl", TEXTS)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_of(*specs: Path | str, split: Any = "all") -> list[str]:
    return [document.text for document in read_documents([str(spec) for spec in specs], split)]


def test_every_format_gives_the_same_texts(tmp_path: Path, jsonl: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"text": TEXTS, "id": range(60)}), tmp_path / "tales[1].parquet", row_group_size=7
    )
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        ending = "md" if number % 2 else "txt"
        name = f"deep/{number:03}.{ending}" if number >= 30 else f"a{number:03}.{ending}"
        (folder / name).write_bytes(text.encode())
    assert texts_of(jsonl) == TEXTS
    assert texts_of(tmp_path / "tales[1].parquet") == TEXTS
    assert texts_of(folder) == TEXTS


def test_the_domain_is_the_name_of_what_was_given(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    write_jsonl(folder / "one.jsonl", ["Dear"])
    documents = read_documents(["builtin:arithmetic", str(jsonl), str(folder)], "all").by_domain()
    assert list(documents) == ["arithmetic", "tales", "letters"]
    assert list(documents["letters"]) == [Document("Dear", "letters")]
    assert {document.domain for document in documents["tales"]} == {"tales"}


def test_splits_partition_the_documents(jsonl: Path) -> None:
    train, heldout = texts_of(jsonl, split="train"), texts_of(jsonl, split="heldout")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(TEXTS)


def test_a_tenth_is_held_out_the_same_tenth_in_any_order(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(4000)]
    forward = texts_of(write_jsonl(tmp_path / "forward.jsonl", texts), split="heldout")
    backward = texts_of(write_jsonl(tmp_path / "backward.jsonl", texts[::-1]), split="heldout")
    assert forward == backward[::-1]
    assert 0.08 < len(forward) / len(texts) < 0.12


def test_the_split_never_changes() -> None:
    """A later release must not evaluate on what was trained on. The numbers come from `printf "text 0" | sha256sum`."""
    assert [number for number in range(40) if split_of(f"text {number}") == "heldout"] == [12, 13, 19, 20, 26, 30]


def test_documents_can_be_read_again(jsonl: Path) -> None:
    documents = read_documents([str(jsonl)], "train")
    assert list(documents) == list(documents)


def test_any_prefix_holds_as_much_of_each_source(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", ["s" * 10] * 1000)
    long = write_jsonl(tmp_path / "long.jsonl", ["l" * 100] * 50)
    documents = list(read_documents([str(short), str(long)], "all"))
    characters = {"short": 0, "long": 0}
    for document in documents[:400]:
        characters[document.domain] += len(document.text)
        assert abs(characters["short"] - characters["long"]) <= 100
    assert len(documents) == 1050, "what is left of the longer source follows"


def test_blank_lines_and_blank_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n   \n{"text": " \\n"}\n{"text": "b"}', encoding="utf-8")
    assert texts_of(path) == ["a", "b"]


def test_a_directory_skips_hidden_and_other_files(tmp_path: Path) -> None:
    for name in (".git/config.txt", ".hidden.txt", "weights.bin", "z.txt", "b/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["b/c.md", "z.txt"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', ["line 3", "list", "not an object"]),
        ("a.jsonl", b'{"content": "a"}\n', ["line 1", "no `text`", "content"]),
        ("a.jsonl", b'{"messages": []}\n', ["line 1", "no `text`", "chat template"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', ["line 2", "int"]),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "UTF-8"]),
        ("a.jsonl", b"[" * 100_000 + b"\n", ["line 1", "not JSON"]),
        ("a.jsonl", b"", ["holds no text"]),
        ("a.txt", b"first\nsecond \xff\n", ["line 2", "UTF-8"]),
        ("a.md", b" \n", ["holds no text"]),
        ("a.parquet", b"no parquet at all", ["damaged"]),
        ("a.csv", b"text\na\n", [".jsonl, .txt, .md, .parquet", "does not end"]),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, name: str, content: bytes, says: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        texts_of(path)
    assert str(path) in caught.value.what
    message = "\n".join(caught.value.lines())
    for words in says:
        assert words in message


def test_a_parquet_file_without_texts_names_its_columns_or_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for table, says in (({"body": ["a"]}, "fields: body"), ({"text": ["a", None]}, "row 2, has a `text` of type None")):
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=re.escape(says)):
            texts_of(tmp_path / "a.parquet")


def test_a_directory_without_data_says_what_data_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no data file"):
        texts_of(tmp_path)


def test_an_empty_split_says_how_documents_are_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", ["text 0", "text 1"])
    with pytest.raises(InputError, match=r"None of the 2 document\(s\) .* held-out split"):
        texts_of(path, split="heldout")


@pytest.mark.parametrize("spec", ["./missing", "missing.jsonl", "data/missing.jsonl", "/missing", "a b", "missing"])
def test_a_missing_path_is_not_looked_up_on_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="does not exist"):
        read_documents([spec])


def test_an_unknown_builtin_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        read_documents(["builtin:poetry"])
    for name in BUILTIN:
        assert f"builtin:{name}" in caught.value.fix


def test_no_data_at_all() -> None:
    with pytest.raises(InputError, match="No data was given"):
        read_documents([])


class FakeHub:
    """Stands for `datasets.load_dataset`: one dataset, `org/name`, with two splits."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        self.rows = rows

    def __call__(self, name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert streaming and name == "org/name"
        if split not in self.rows:
            raise ValueError(f"Bad split: {split}. Available splits: {sorted(self.rows)}\nmore")
        return iter(self.rows[split])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    datasets = pytest.importorskip("datasets")
    fake = FakeHub({"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}], "raw": [{"body": "d"}]})
    monkeypatch.setattr(datasets, "load_dataset", fake)
    return fake


@pytest.mark.usefixtures("hub")
def test_a_hub_dataset_is_streamed_by_split() -> None:
    assert list(read_documents(["org/name"], "all")) == [Document("a", "org/name"), Document("b", "org/name")]
    assert list(read_documents(["org/name:test"], "all")) == [Document("c", "org/name")]


@pytest.mark.usefixtures("hub")
def test_hub_errors_say_what_the_hub_said() -> None:
    with pytest.raises(InputError) as caught:
        texts_of("org/name:dev")
    assert "org/name:dev" in caught.value.what
    assert caught.value.why == "Bad split: dev. Available splits: ['raw', 'test', 'train']"
    with pytest.raises(InputError, match=re.escape("org/name:raw, row 1, has no `text` string (fields: body)")):
        texts_of("org/name:raw")


@pytest.mark.usefixtures("hub")
def test_a_local_path_wins_over_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/a.txt").write_text("local")
    assert list(read_documents(["org/name"], "all")) == [Document("local", "name")]


def test_the_hub_out_of_reach_is_the_machine_s_fault() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    pytest.importorskip("datasets")
    with pytest.raises(MachineError, match="org/name:train could not be fetched"):
        texts_of("org/name")


@pytest.mark.parametrize(("spec", "library"), [("org/name", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, library: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MachineError) as caught:
        texts_of(spec)
    assert caught.value.fix == "pip install 'moectl[data]'"
