"""Every threat that a reader and writer of other people's checkpoints meets, and the tests that hold its answer.

`threat_rows.ROWS` is the table: what goes wrong, and where it is tested. The tests of this file are those that had
no better place, and the planted ones: they take a check away and show that the bad input would then pass.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from files import checkpoint, random_array, safetensors_bytes
from hostile_files import MONSTERS, bad_file
from hub_fakes import SECRET, hub_failures
from quick import SECONDS, least_cpu_seconds
from threat_rows import ROWS
from trees import CONFIG, dense_llama

from moectl.checkpoint import header, source
from moectl.checkpoint.header import read_header
from moectl.checkpoint.plan import source_identity
from moectl.checkpoint.source import INDEX, SINGLE, Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError, UsageError
from moectl.evaluation.inspect import inspect
from moectl.families import config as configs
from moectl.families import fields
from moectl.families.llama import LLAMA
from moectl.families.shapes import expected_tensors
from moectl.upcycle import sparse
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

TESTS = Path(__file__).parent.parent


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_tests(row: int) -> None:
    for test in ROWS[row]:
        file, _, name = test.partition("::")
        assert name in functions(TESTS / file), test


def test_the_table_is_whole() -> None:
    assert set(ROWS) == {*range(1, 30), *range(31, 36), 37, 38}


# ---- weights (1-6, 13) --------------------------------------------------------------------------------------

THREE = {f"model-0000{n}-of-00003.safetensors": {f"t{n}": random_array((64,), seed=n)} for n in (1, 2, 3)}


@pytest.mark.parametrize("shard", THREE)
@pytest.mark.parametrize("left", [lambda n: n - 1, lambda n: n - 8, lambda n: n // 2, lambda _: 0])
def test_a_cut_shard_is_named_with_both_sizes(shard: str, left: Callable[[int], int], tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", THREE)
    size = (path / shard).stat().st_size
    os.truncate(path / shard, left(size))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(path)
    assert shard in caught.value.what and str(left(size)) in caught.value.what
    assert left(size) < size // 2 or str(size) in caught.value.what


def refusal(run: Callable[[], object]) -> InputError:
    """The error that `run` ends with."""
    with pytest.raises(InputError) as caught:
        run()
    return caught.value


@pytest.mark.parametrize("kind", MONSTERS)
def test_monstrous_headers_are_refused_quickly_in_little_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(MONSTERS[kind]())
    tracemalloc.start()
    try:
        error, seconds = least_cpu_seconds(lambda: refusal(lambda: read_header(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < SECONDS
    assert peak < 100_000_000
    assert str(path) in error.what and len(error.what) < 1000


def test_a_pickle_does_not_run_under_any_name(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    names = (SINGLE, "pytorch_model.bin", "model.pt", "consolidated.00.pth", "config.json", INDEX)
    for number, name in enumerate(names):
        path = checkpoint(tmp_path / str(number), {"a": random_array((2,))})
        if not name.endswith((".safetensors", ".json")):
            (path / SINGLE).unlink()
        (path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError):
            Checkpoint.open(path)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "marker").exists(), "the payload would not have run"


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    makes: tuple[Callable[[Path], object], ...] = (os.mkfifo, Path.mkdir, lambda place: place.symlink_to("/dev/zero"))
    for number, make in enumerate(makes):
        path = checkpoint(tmp_path / str(number), THREE if name == INDEX else {"a": random_array((2,))})
        (path / name).unlink()
        make(path / name)
        with pytest.raises(InputError, match="is not a regular file"):
            Checkpoint.open(path)


# ---- directories and configs (8, 14-16) ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "a/b", "..", "x\x1b", "x" * 300, "C:x"])
def test_provenance_never_leads_outside(name: str, tmp_path: Path) -> None:
    from moectl.checkpoint.provenance import SCHEMA, verify_hashes

    path = checkpoint(tmp_path / "m", {"a": random_array((2,))})
    (path / "moectl.json").write_text(json.dumps({"schema": SCHEMA, "tensors": {}, "files": {name: ""}}))
    with pytest.raises(InputError, match="not a file beside it"):
        verify_hashes(Checkpoint.open(path))


def test_code_in_a_checkpoint_is_said_and_neither_run_nor_copied(tmp_path: Path) -> None:
    code = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "trust_remote_code": True,
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
    }
    dense = dense_llama(tmp_path / "dense", **code)
    (dense / "modeling_evil.py").write_text("import os\nos.mkdir('marker')\n")
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "upcycle", "sparse", str(dense), "-o", "moe"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr and "brings code of its own (auto_map" in done.stderr
    assert not (tmp_path / "marker").exists()
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert not set(code) & set(written)
    assert not list((tmp_path / "moe").glob("*.py"))
    assert "evil" not in "".join(p.read_text() for p in (tmp_path / "moe").iterdir() if p.suffix in (".json", ".md"))


def test_a_plain_checkpoint_brings_no_warning(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", {"a": random_array((2,))}, auto_map=None)
    assert Checkpoint.open(path).warnings == []


def test_weights_that_are_not_read_are_said(tmp_path: Path) -> None:
    """transformers prefers `shard-00001-model-00001-of-00002.safetensors` to model.safetensors beside it."""
    path = checkpoint(tmp_path / "m", {"a": random_array((2,))})
    (path / "shard-00001-model-00001.safetensors").write_bytes(b"other weights")
    assert "'shard-00001-model-00001.safetensors'" in Checkpoint.open(path).warnings[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 99_999},
        {"hidden_size": -1},
        {"hidden_size": 10**400},
        {"vocab_size": 2**40},
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"num_key_value_heads": "2"},
        {"head_dim": 1.5},
        {"intermediate_size": [48]},
        {"rope_theta": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rope_scaling": ["yarn"]},
        {"rope_scaling": {"rope_type": "yarn", "factor": float("-inf")}},
        {"rope_parameters": {"rope_theta": "10000"}},
        {"tie_word_embeddings": "false"},
        {"quantization_config": {"quant_method": "unheard-of"}},
        {"quantization_config": {"quant_method": ["fp8"]}},
        {"dtype": {}},
    ],
    ids=str,
)
def test_absurd_numbers_are_refused_before_anything_is_made(changes: dict[str, Any], tmp_path: Path) -> None:
    path = dense_llama(tmp_path / "dense")
    stated = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**stated, **changes}))
    error, seconds = least_cpu_seconds(lambda: refusal(lambda: plan_sparse(Checkpoint.open(path), SparseRecipe())))
    assert seconds < SECONDS
    assert next(iter(changes)) in error.what or "tensor" in error.what
    assert len(error.what) < 1000


@pytest.mark.parametrize("top_k", [3, 10**4299])
def test_more_active_experts_than_there_are_is_no_count(top_k: int, tmp_path: Path) -> None:
    """The product of two such numbers could not even be printed: Python stops at 4300 digits."""
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    path = checkpoint(tmp_path / "m", {name: random_array((4, 4))}, num_experts=1, num_experts_per_tok=top_k)
    found = inspect(Checkpoint.open(path))
    assert found.active_parameters is None
    json.dumps(found.to_json())


def test_recipes_of_absurd_sizes_are_refused(tmp_path: Path) -> None:
    opened = Checkpoint.open(dense_llama(tmp_path / "dense"))
    for recipe in (SparseRecipe(experts=2**31), SparseRecipe(experts=10**4299), SparseRecipe(noise=float("nan"))):
        with pytest.raises(UsageError):
            plan_sparse(opened, recipe)


@pytest.mark.parametrize("model", ["~nobody-by-this-name/model", "x" * 5000, "./" + "x" * 300, "a\0b", "./a\x1b[2J"])
def test_paths_that_cannot_be_are_refused(model: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(model)
    assert caught.value.what.isprintable()


def test_a_gap_between_config_and_weights_is_refused(tmp_path: Path) -> None:
    path = dense_llama(tmp_path / "dense")
    stated = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**stated, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks tensor 'model.layers.2"):
        plan_sparse(Checkpoint.open(path), SparseRecipe())
    (path / "config.json").write_text(json.dumps({**stated, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"holds tensor 'model.layers.1"):
        plan_sparse(Checkpoint.open(path), SparseRecipe())


# ---- the checks, taken away ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "module", "check"),
    [
        ("cut", header, "_check_partition"),
        ("trailing", header, "_check_partition"),
        ("overlap", header, "_check_partition"),
        ("duplicate", header, "_no_duplicates"),
        ("outside", source, "is_plain_name"),
        ("unlisted", source, "_compare_with_index"),
        ("lfs", header, "_header_text"),
        ("nan in the config", fields, "_is_finite"),
        ("layer missing", sparse, "check_tensors"),
    ],
)
def test_without_its_check_it_would_pass(
    kind: str, module: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"nan in the config": {"rms_norm_eps": float("nan")}, "layer missing": {"num_hidden_layers": 1}}
    if kind in changes:
        path = dense_llama(tmp_path / "m")
        stated = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**stated, **changes[kind]}))
    elif kind == "lfs":
        path = checkpoint(tmp_path / "m", {"a": random_array((2,))})
        (path / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    else:
        path = bad_file(kind, tmp_path)

    def use() -> None:
        opened = Checkpoint.open(path)
        if kind in changes:
            plan_sparse(opened, SparseRecipe(experts=2))

    with pytest.raises(InputError):
        use()
    names = [name for name, _ in expected_tensors(LLAMA, configs.normalised(LLAMA, {**CONFIG, "num_hidden_layers": 1}))]
    absent: dict[str, Callable[..., Any]] = {
        "_no_duplicates": dict,
        "is_plain_name": lambda _: True,
        "_header_text": lambda *_: ("{}", (path / SINGLE).stat().st_size),
        "_is_finite": lambda _: True,
        "check_tensors": lambda *_: names,
    }
    monkeypatch.setattr(module, check, absent.get(check, lambda *_: None))
    if kind == "outside":  # a second check would notice that the name is no name
        monkeypatch.setattr(source, "_compare_with_index", lambda *_: None)
    if kind == "nan in the config":  # a second check looks at the config that comes out
        monkeypatch.setattr(configs, "check_json", lambda _: None)
    use()


# ---- while running (28, 29) ---------------------------------------------------------------------------------


def test_a_file_cut_in_mid_run_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """With mmap this is SIGBUS and exit 135: https://github.com/huggingface/safetensors/issues/195."""
    dense = dense_llama(tmp_path / "dense")
    script = f"""
import os, sys
from moectl.checkpoint import writer
from moectl.cli.main import main
begin = writer.Journal.begin
def cut(*args, **options):
    os.truncate({str(dense / SINGLE)!r}, 5000)
    return begin(*args, **options)
writer.Journal.begin = cut
sys.argv = ["moectl", "upcycle", "sparse", {str(dense)!r}, "--noise", "0.1", "-o", {str(tmp_path / "moe")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert SINGLE in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "moe").exists()


def peak_of_upcycling(layers: int, tmp_path: Path) -> int:
    """Peak resident bytes of `moectl upcycle sparse` on a model of one shard per layer, every weight recomputed."""
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "head_dim": 4}
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name, shape in expected_tensors(LLAMA, configs.normalised(LLAMA, config)):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "0"
        shards.setdefault(f"model-{int(layer):05d}.safetensors", {})[name] = np.ones(shape, ml_dtypes.bfloat16)
    assert len(shards) == layers
    path = checkpoint(tmp_path / f"dense{layers}", shards, **config)
    script = """
from pathlib import Path
from moectl.cli.main import main
try:
    main()
finally:  # ru_maxrss would also hold what the parent had before the exec
    lines = Path("/proc/self/status").read_text().splitlines()
    print([int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")][0])
"""
    arguments = ["upcycle", "sparse", str(path), "--experts", "2", "--dtype", "float16", "--shard-size", "4MB", "-o"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, str(tmp_path / f"moe{layers}")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """100 shards of 0.8 MB become 157 MB: were they held, it would show."""
    assert peak_of_upcycling(100, tmp_path) < peak_of_upcycling(5, tmp_path) + 20_000_000


# ---- what is shown (32) -------------------------------------------------------------------------------------

HOSTILE = "no\x1b[31m[bold]\n\twhere"


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path / HOSTILE, {"a": random_array((2,))}, architectures=[HOSTILE], hidden_act=HOSTILE, auto_map={"a": 1}
    )
    (path / (HOSTILE + ".py")).write_text("")
    (path / (HOSTILE + ".safetensors")).write_text("")
    text = subprocess.run([sys.executable, "-m", "moectl", "inspect", path], capture_output=True, text=True)
    assert text.returncode == 0, text.stderr
    assert "\x1b" not in text.stdout + text.stderr
    assert len(text.stderr.splitlines()) == len(Checkpoint.open(path).warnings) == 2
    assert len({line.count("\t") for line in text.stdout.splitlines()}) == 1
    found = subprocess.run([sys.executable, "-m", "moectl", "inspect", path, "--json"], capture_output=True, text=True)
    assert "\x1b" not in found.stdout and json.loads(found.stdout)["architecture"] == HOSTILE
    (path / SINGLE).write_bytes(safetensors_bytes({HOSTILE: random_array((2,))}))
    error = subprocess.run([sys.executable, "-m", "moectl", "inspect", path], capture_output=True, text=True)
    assert error.returncode == 3 and "\x1b" not in error.stderr and len(error.stderr.splitlines()) <= 3


# ---- the Hub (35, 37) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hub_failures())
def test_what_the_hub_says_is_said_without_the_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, expected = hub_failures()[kind]

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(expected) as caught:
        Checkpoint.open("hf://org/name@v1")
    lines = caught.value.lines()
    assert "hf://org/name@v1" in lines[0] and len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert SECRET not in "".join(lines)


def test_a_branch_that_moves_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` names another commit at every call; one run reads one commit, and records it."""
    commits = [dense_llama(tmp_path / ("a" * 40)), dense_llama(tmp_path / ("b" * 40), rms_norm_eps=1e-5)]
    asked: list[str | None] = []

    def moving(_repo: str, revision: str | None = None, **_: object) -> str:
        asked.append(revision)
        return str(commits[len(asked) - 1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", moving)
    opened = Checkpoint.open("hf://org/name@main")
    plan = plan_sparse(opened, SparseRecipe(experts=2))
    write(plan, tmp_path / "moe")
    assert asked == ["main"]
    assert opened.commit == "a" * 40 and {ref.file.parent for ref in opened.tensors.values()} == {commits[0]}
    recorded = json.loads((tmp_path / "moe" / "moectl.json").read_text())["sources"]
    assert [entry["commit"] for entry in recorded] == ["a" * 40]
    assert recorded == [source_identity(opened)]
