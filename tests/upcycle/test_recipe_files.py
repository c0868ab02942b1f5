"""Recipe files: what they say is what is done, and whatever they hold, the answer is a named error or a recipe."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_btx import branches, mixed
from test_btx_statistics import model
from trees import tree

from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import main
from moectl.errors import InputError
from moectl.upcycle import mergekit, recipe_file
from moectl.upcycle.btx_recipe import BtxRecipe, Expert
from moectl.upcycle.recipe_file import Document, build, parse, read_recipe, recipe_schema

WHOLE = """
method: btx
experts:
  - model: code            # a comment
    prompts: ["def f():"]
    negative_prompts: [Once]
    noise: 1e-4
    residual_scale: 2
  - math+adapter
include_seed:
  model: seed
  data: builtin:prose
average: 2,1,1
top_k: 3
split: 2
scale: down
router_init: text
router_logit_std: 0.5
layers: last:2
dtype: bfloat16
allow_tokenizer_mismatch: true
"""
MEANT = BtxRecipe(
    experts=(
        Expert("code", prompts=("def f():",), negative_prompts=("Once",), noise=1e-4, residual_scale=2.0),
        Expert("math+adapter"),
    ),
    include_seed=Expert("seed", data=("builtin:prose",)),
    average="2,1,1",
    top_k=3,
    split=2,
    scale="down",
    router_init="text",
    router_logit_std=0.5,
    layers="last:2",
    dtype="bfloat16",
    allow_tokenizer_mismatch=True,
)
MERGEKIT = """
base_model: org/base@main
gate_mode: {mode}
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: org/code
    positive_prompts:
      - "write a function"
      - "fix this bug"
    negative_prompts: ["a poem"]
    noise_scale: 0.1
  - source_model: org/prose+org/lora
    positive_prompts: ["write a poem"]
    residual_scale: 0.5
"""


def understood(text: str) -> BtxRecipe:
    document = parse(text.encode(), "recipe.yaml")
    if mergekit.is_config(document.data):
        return mergekit.translated(document)[0]
    own = {name: value for name, value in document.data.items() if name != "method"}
    return build(BtxRecipe, dataclasses.replace(document, data=own))


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(WHOLE)
    (tmp_path / "recipe.json").write_text(json.dumps({**yaml.safe_load(WHOLE), "seed": 3}))
    assert read_recipe(str(tmp_path / "recipe.yaml")) == (MEANT, ())
    assert read_recipe(str(tmp_path / "recipe.json")) == (dataclasses.replace(MEANT, seed=3), ())


def test_json_escapes_are_jsons() -> None:
    """A surrogate pair and an escaped slash are JSON, which YAML reads otherwise."""
    assert understood('{"experts": ["a\\/b", "\\ud83d\\ude00"]}').experts == (Expert("a/b"), Expert("😀"))


@pytest.mark.parametrize(
    ("mode", "init", "tokens", "said"),
    [
        ("hidden", "text", "last", "will see"),
        ("hidden_last", "text", "last", "will see"),
        ("hidden_avg", "text", "all", "will see"),
        ("cheap_embed", "embedding", "all", "length 1"),
        ("random", "random", "all", "0.02"),
        ("uniform_random", "random", "all", "0.02"),
    ],
)
def test_a_mergekit_config_means_what_it_meant(mode: str, init: str, tokens: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(MERGEKIT.format(mode=mode))
    recipe, (note,) = read_recipe(str(tmp_path / "config.yml"))
    assert said in note and mode in note
    prompts = ("write a function", "fix this bug")
    assert recipe == BtxRecipe(
        experts=(
            Expert("org/code", prompts=prompts, negative_prompts=("a poem",), noise=0.1),
            Expert("org/prose+org/lora", prompts=("write a poem",), residual_scale=0.5),
        ),
        base="hf://org/base@main",
        average="base",
        top_k=2,
        router_init=init,
        router_tokens=tokens,
        dtype="bfloat16",
    )
    recipe.check()


def test_the_rest_of_a_mergekit_config() -> None:
    text = MERGEKIT.format(mode="hidden") + "architecture: qwen\nshared_experts:\n  - source_model: org/base\n"
    recipe = understood(text.replace("dtype: bfloat16\n", ""))
    assert recipe.into == "qwen2_moe" and recipe.shared_expert == Expert("org/base") and recipe.dtype == "auto"
    assert understood("base_model: b\nexperts: [{source_model: a, positive_prompts: [x]}]").router_init == "text"


@pytest.mark.parametrize(
    ("old", "new", "where", "word"),
    [
        ("gate_mode: hidden", "gate_mode: best", "line 3: gate_mode", "Give one of hidden"),
        ("dtype: bfloat16", "dtype: int8", "line 4: dtype", "bfloat16"),
        ("dtype: bfloat16", "slices: []", "line 4: slices", "Use: base_model"),
        ("experts_per_token: 2", "experts_per_token: two", "line 5: experts_per_token", "whole number"),
        ("    noise_scale: 0.1", "    gate: 1", "line 12: experts[0].gate", "Use: source_model"),
        ("source_model: org/code", "source_model: {model: x}", "line 7: experts[0].source_model", "expected text"),
        ("base_model: org/base@main", "base: x", "line 2: base", "Use: base_model"),
        ("dtype: bfloat16", "architecture: deepseek", "line 4: architecture", "mixtral"),
        ("dtype: bfloat16", "shared_experts: [a, b]", "line 4: shared_experts", "several"),
        (
            "    residual_scale: 0.5",
            "    residual_scale: much",
            "line 15: experts[1].residual_scale",
            "expected a number",
        ),
    ],
)
def test_what_a_mergekit_config_cannot_say(old: str, new: str, where: str, word: str) -> None:
    text = MERGEKIT.format(mode="hidden")
    assert old in text
    with pytest.raises(InputError) as caught:
        understood(text.replace(old, new))
    message = " ".join(caught.value.lines())
    assert message.startswith("recipe.yaml, line") and where in message and word in message


@pytest.mark.parametrize(
    ("text", "where", "word"),
    [
        ("experts: [a]\ntopk: 2", "line 2: topk", "top_k"),
        ("experts: [a]\ntop_k: two", "line 2: top_k", "text, expected a whole number"),
        ("experts: [a]\ntop_k: true", "line 2: top_k", "a truth value"),
        ("experts: [a]\nnoise: null", "line 2: noise", "null, expected a number"),
        ("experts:\n- model: a\n  prompts: [1]", "line 3: experts[0].prompts[0]", "Quote it"),
        ("experts:\n- prompts: [x]", "experts[0].model is missing", "Add it"),
        ("experts: [a]\nscale: big", "line 2: scale is 'big'", "auto, updown"),
        ("experts: {a: b}", "line 1: experts is a map", "- item"),
        ("experts: [2026-01-02]", "line 1: experts[0]", "date"),
        ("experts: [2026-99-99]", "line 1", "Quote it"),
        ("experts: [a]\nexperts: [b]", "line 2", "twice"),
        ("top_k: 2", "experts is missing", "Add it"),
        ("- a\n- b", "it is a list", "field: value"),
        ("just words", "it is text", "field: value"),
        ("", "is empty", "recipe schema"),
        ("experts: [a", "line 1", "neither YAML nor JSON"),
        ("a: b: c", "line 1", "neither YAML nor JSON"),
        ("experts: !!python/object/apply:os.system [ls]", "line 1", "plain lists"),
        ("experts: [!!python/name:os.system x]", "line 1", "neither YAML nor JSON"),
        ("x: &a [1]\ny: *a", "line 2 uses an alias", "Write the value out"),
        ("? [a]\n: b", "line 1", "not a word"),
        ("experts: [a]\nseed: " + "9" * 30, "line 2: seed", "beyond any use"),
        ("experts: [a]\nseed: " + "9" * 5000, "line 2", "Quote it"),
        ("\x00", "neither YAML nor JSON", "Correct it"),
        ("method: sparse\nexperts: [a]", "method is 'sparse'", "btx"),
    ],
)
def test_errors_name_file_line_and_field(text: str, where: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(str(path))
    message = " ".join(caught.value.lines())
    assert message.startswith(f"{path}") and where in message and word in message


def test_size_depth_and_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_file, "MAX_VALUES", 1_000)
    for text, word in (
        ("a: " + "[" * 100_000, "nested more than 16 deep"),
        ("[" * 100_000, "nested more than 16 deep"),
        ("x: [" + "1," * 2_000 + "]", "more than 1000 values"),
        ("x" * (recipe_file.MAX_BYTES + 1), "larger than 4 MB"),
        ("\ud800", "not UTF-8"),
    ):
        with pytest.raises(InputError, match=word):
            parse(text.encode(errors="surrogatepass"), "r")
    laughs = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    with pytest.raises(InputError, match="alias"):
        parse(laughs.encode(), "r")
    for name in (str(tmp_path), str(tmp_path / "none"), "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            read_recipe(name)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KINDS = (BtxRecipe, Expert, mergekit.MergekitConfig, mergekit.MergekitExpert)
NAMES = [each.name for kind in KINDS for each in dataclasses.fields(kind)]
FIELDS = st.sampled_from([*NAMES, "method"])
LIKELY = st.recursive(
    PLAIN, lambda inner: st.dictionaries(FIELDS, inner, max_size=5) | st.lists(inner, max_size=3), max_leaves=12
)


def survives(raw: bytes) -> None:
    """Either a recipe that can be checked, or an error with all that a reader needs, fit to be printed."""
    try:
        document = parse(raw, "r.yaml")
        if mergekit.is_config(document.data):
            recipe, _ = mergekit.translated(document)
        else:
            recipe = build(BtxRecipe, document)
    except InputError as error:
        lines = error.lines()
        assert len(lines) == 3 and lines[0].startswith("r.yaml")
        assert all(line.isprintable() and len(line) < 1000 for line in lines), lines
    else:
        assert isinstance(recipe, BtxRecipe) and all(isinstance(each, Expert) for each in recipe.experts)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LIKELY, st.sampled_from(["json", "yaml"]))
@example({"experts": [], "base_model": "x"}, "yaml")
@example({"experts": "a", "gate_mode": ["hidden"]}, "yaml")
def test_recipes_of_any_shape(data: Any, form: str) -> None:
    text = json.dumps(data) if form == "json" else yaml.safe_dump(data, allow_unicode=True)
    survives(text.encode(errors="surrogatepass"))


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!?|>%@`'\"\n 1.#,<=~\\\x07é", max_size=60).map(str.encode))
@example(b"%YAML 9.9\n--- a")
@example(b"!!binary x")
@example(b"!!int x")
@example(b"!!float ''")
@example(b"!!timestamp x")
@example(b"!!set {a}")
@example(b"<<: x")
@example(b"=: 1")
def test_bytes_of_any_kind(raw: bytes) -> None:
    survives(raw)


def test_the_schema_is_of_the_dataclass(moectl: Callable[..., Ended]) -> None:
    """Every field with its sentence; what the schema's own defaults say is the recipe that says nothing."""
    schema = recipe_schema()
    assert json.loads(json.dumps(schema))["required"] == ["experts"]
    properties = {name: each for name, each in schema["properties"].items() if name != "method"}
    assert list(properties) == [each.name for each in dataclasses.fields(BtxRecipe)]
    assert all(each["description"] for each in properties.values())
    said = {name: each["default"] for name, each in properties.items() if name != "experts"}
    assert build(BtxRecipe, Document("defaults", {"experts": ["a"], **said})) == BtxRecipe((Expert("a"),))
    assert properties["router_init"]["enum"] == ["random", "text", "embedding"]
    assert json.loads(moectl("recipe", "schema").stdout) == json.loads(json.dumps(schema))


@dataclasses.dataclass
class Ended:
    """How the program ended, and what it wrote."""

    code: object
    stdout: str
    stderr: str


@pytest.fixture
def moectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The program in this process, which has torch already."""

    def run(*arguments: str, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["moectl", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def test_a_recipe_on_standard_input_and_options_beside_it(tmp_path: Path, moectl: Callable[..., Ended]) -> None:
    paths = branches(tmp_path, 2)
    text = yaml.safe_dump({"experts": [str(path) for path in paths], "top_k": 1, "average": "base"})
    run = moectl("upcycle", "btx", "--recipe", "-", "--average", "2,1", "-o", str(tmp_path / "cli"), stdin=text)
    assert run.code == 0, run.stderr
    assert run.stdout == f"{tmp_path / 'cli'}\n"
    assert tree(tmp_path / "cli") == tree(mixed(paths, tmp_path / "own", top_k=1, average="2,1"))
    again = moectl("upcycle", "btx", str(paths[0]), "--recipe", "-", "-o", str(tmp_path / "x"), stdin=text)
    assert again.code == 2 and "EXPERT and --recipe" in again.stderr
    bad = moectl("upcycle", "btx", "--recipe", "-", "-o", str(tmp_path / "x"), stdin="experts: [a]\nfoo: 1")
    assert bad.code == 3 and "standard input, line 2: foo" in bad.stderr


def test_a_mergekit_config_by_command(tmp_path: Path, moectl: Callable[..., Ended]) -> None:
    """Unchanged but for the program's name: the base's tensors, each model's FFN, rows from prompts; and a dry run."""
    paths = [str(model(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    experts = [{"source_model": path, "positive_prompts": [text]} for path, text in zip(paths[1:], "ab", strict=True)]
    config = {"base_model": paths[0], "gate_mode": "hidden", "experts": experts}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    arguments = ("upcycle", "btx", "--recipe", str(tmp_path / "config.yml"), "-o", str(tmp_path / "out"), "--json")
    dry = moectl(*arguments, "--dry-run")
    assert dry.code == 0, dry.stderr
    assert not list(tmp_path.glob("out*"))
    run = moectl(*arguments)
    assert run.code == 0, run.stderr
    assert "gate_mode hidden" in run.stderr
    assert json.loads(run.stdout)["fingerprint"] == json.loads(dry.stdout)["fingerprint"]
    moe = Checkpoint.open(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert (moe.read(name) == Checkpoint.open(paths[0]).read(name)).all()
    expert = moe.read("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    assert (expert == Checkpoint.open(paths[2]).read("model.layers.0.mlp.down_proj.weight")).all()
    few = moectl("upcycle", "btx", *paths, "-o", str(tmp_path / "x"), "--data", "builtin:code")
    assert few.code == 2 and "1 --data for 3 models" in few.stderr
