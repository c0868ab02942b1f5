"""Recipe files: YAML or JSON to a frozen dataclass, and the dataclass to a JSON schema, from the same annotations.

A file is data from anywhere: its size, depth and number of values are bounded before anything is built, aliases
(which can make a page of text into gigabytes) are refused, and every error names the file, the line and the field.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from moectl.checkpoint.header import parse_json
from moectl.errors import InputError
from moectl.text import escape, shown
from moectl.upcycle.btx_recipe import BtxRecipe

MAX_BYTES = 4_000_000
MAX_DEPTH = 16
MAX_VALUES = 100_000
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

_EXPONENT = re.compile(r"[-+]?\d{1,20}[eE][-+]?\d{1,4}")
"""A number to everybody but YAML 1.1, which wants a point in 1e-4."""

FieldPath = tuple[str | int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """What a recipe file says: plain data, and the line of every field where the format tells."""

    name: str
    data: Any
    lines: Mapping[FieldPath, int] = field(default_factory=dict)

    def bad(self, path: FieldPath, what: str, fix: str) -> InputError:
        """The error for the value at `path`."""
        line = self.lines.get(path)
        where = self.name + (f", line {line}" if line else "")
        named = "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part, 60)}" for part in path).lstrip(".")
        return InputError(f"{where}: {named + ' ' if named else 'it '}{what}.", "The recipe cannot be followed.", fix)


def read_document(name: str) -> Document:
    """The recipe file `name`, or standard input for "-", as plain data.

    Raises:
        InputError: it cannot be read, is neither YAML nor JSON, or is larger or deeper than any recipe.
    """
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name is no path"
        raise InputError(
            f"{shown(name)} cannot be read: {reason}.", "There is no recipe to follow.", "Check the path."
        ) from None
    return parse(raw, "standard input" if name == "-" else shown(name))


def parse(raw: bytes, name: str) -> Document:
    """The text of a recipe, JSON or YAML, as plain data; `name` is for messages.

    Raises:
        InputError: as `read_document`.
    """
    if len(raw) > MAX_BYTES:
        _refuse(name, f"is larger than {MAX_BYTES // 10**6} MB", "Put long texts into data files, and name these.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(name, f"is not UTF-8 (byte {error.start})", "Save it as UTF-8.")
    if text.lstrip()[:1] in ("{", "["):
        try:
            return Document(name, parse_json(text))
        except ValueError:
            pass  # YAML has braces too, and its parser says at which line it gave up
    return _parse_yaml(text, name)


def build(kind: type[T], document: Document, path: FieldPath = (), data: Any = None) -> T:
    """A dataclass from plain data, every field checked against its annotation.

    Raises:
        InputError: a field is unknown, missing or of another type.
    """
    data = document.data if not path else data
    if not isinstance(data, dict):
        raise document.bad(path, f"is {_kind(data)}, expected fields and their values", "Write `field: value` lines.")
    hints = get_type_hints(kind)
    known = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise document.bad((*path, name), "is not a field that is known", f"Use: {', '.join(known)}.")
    values = {name: _value(hints[name], document, (*path, name), value) for name, value in data.items()}
    for name, each in known.items():
        if name not in values and each.default is dataclasses.MISSING:
            raise document.bad((*path, name), "is missing", "Add it.")
        choices = each.metadata.get("choices")
        if choices and name in values and values[name] not in choices:
            raise document.bad((*path, name), f"is {shown(values[name])!r}", f"Give one of {', '.join(choices)}.")
    return kind(**values)


def read_recipe(name: str) -> tuple[BtxRecipe, tuple[str, ...]]:
    """The recipe in a file ("-" for standard input), moectl's own or a mergekit-moe config, and notes on the latter.

    Raises:
        InputError: the file cannot be read or followed.
    """
    from moectl.upcycle import mergekit

    document = read_document(name)
    if mergekit.is_config(document.data):
        return mergekit.translated(document)
    if isinstance(document.data, dict) and document.data.get("method", "btx") != "btx":
        raise document.bad(("method",), f"is {shown(document.data['method'])!r}", "Recipe files are for btx so far.")
    if isinstance(document.data, dict):
        own = {name: value for name, value in document.data.items() if name != "method"}
        document = dataclasses.replace(document, data=own)
    return build(BtxRecipe, document), ()


def schema(kind: type) -> dict[str, Any]:
    """The JSON schema of a dataclass's fields."""
    hints = get_type_hints(kind)
    properties, required = {}, []
    for each in dataclasses.fields(kind):
        properties[each.name] = _type_schema(hints[each.name])
        if each.metadata.get("choices"):
            properties[each.name]["enum"] = list(each.metadata["choices"])
        properties[each.name]["description"] = each.metadata["doc"]
        if each.default is dataclasses.MISSING:
            required.append(each.name)
        else:
            properties[each.name]["default"] = each.default
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of moectl's recipe files."""
    whole = schema(BtxRecipe)
    method = {"const": "btx", "description": "What the recipe is for; may be left out.", "default": "btx"}
    return {
        "$schema": SCHEMA_DIALECT,
        "title": "moectl recipe",
        **whole,
        "properties": {"method": method, **whole["properties"]},
    }


def _value(hint: Any, document: Document, path: FieldPath, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        short = dataclasses.fields(hint)[0].name
        return build(hint, document, path, {short: value} if isinstance(value, str) else value)  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (inner,) = (each for each in get_args(hint) if each is not type(None))
        return _value(inner, document, path, value)
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise document.bad(path, f"is {_kind(value)}, expected a list", "Write one `- item` line for each.")
        return tuple(_value(inner, document, (*path, i), item) for i, item in enumerate(items))
    if hint is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if type(value) is not hint:
        fix = "Quote it." if hint is str and isinstance(value, int | float) else "Change it."
        raise document.bad(path, f"is {_kind(value)}, expected {_WORDS[hint]}", fix)
    if hint is int and abs(value) >= 1 << 63:
        raise document.bad(path, "is a number beyond any use", "Give a smaller one.")
    return value


def _type_schema(hint: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        return {"anyOf": [{"type": "string"}, schema(hint)]}  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        return {"anyOf": [_type_schema(each) for each in get_args(hint)]}
    if get_origin(hint) is tuple:
        inner = _type_schema(get_args(hint)[0])
        return {"anyOf": [{"type": "array", "items": inner}, {"type": "string"}]}
    return {"type": _JSON_TYPES[hint]}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        dict: "a map",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a whole number",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _parse_yaml(text: str, name: str) -> Document:
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            _refuse(name, "is empty", "Write a recipe: moectl recipe schema prints what it can say.")
        lines: dict[FieldPath, int] = {}
        return Document(name, _plain(node, name, (), lines), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        _refuse(f"{name}{where}", f"is neither YAML nor JSON: {shown(problem)}", "Correct it there.")


def _check_events(events: Any, name: str) -> None:
    """Bound depth and number of values by the parser's events, which come one by one without recursion."""
    import yaml

    depth = 0
    for values, event in enumerate(events):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            _refuse(f"{name}, line {line}", "uses an alias (*name)", "Write the value out.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            _refuse(f"{name}, line {line}", f"is nested more than {MAX_DEPTH} deep", "No recipe is; write a flat one.")
        if values > MAX_VALUES:
            _refuse(f"{name}, line {line}", f"holds more than {MAX_VALUES} values", "Put texts into data files.")


def _plain(node: Any, name: str, path: FieldPath, lines: dict[FieldPath, int]) -> Any:
    import yaml

    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_TAGS:
        _refuse(f"{name}, line {lines[path]}", f"has a {shown(node.tag, 60)}", "Use plain lists and maps.")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name, (*path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key, value in node.value:
            where = f"{name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                _refuse(where, "has a field whose name is not a word", "Write `field: value` lines.")
            if key.value in result:
                _refuse(where, f"has the field {shown(key.value, 60)!r} twice", "Remove one.")
            result[key.value] = _plain(value, name, (*path, key.value), lines)
            lines[(*path, key.value)] = key.start_mark.line + 1
        return result
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # PyYAML checks no scalar itself
        _refuse(f"{name}, line {lines[path]}", f"has a value that is none: {shown(node.value, 60)!r}", "Quote it.")


def _refuse(name: str, what: str, fix: str) -> NoReturn:
    raise InputError(f"{escape(name)} {what}.", "The recipe cannot be followed.", fix)
