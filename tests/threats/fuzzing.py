"""Broken checkpoints drawn at random, and the one thing asked of every program that reads them.

Each generator takes a `random.Random` (hypothesis lends one that it can shrink) and returns a `Case`. The long run
of `benchmarks/fuzz.py` draws from the same generators.
"""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from quick import SECONDS, least_cpu_seconds

from moectl.checkpoint.provenance import SCHEMA, read_provenance, verify_hashes
from moectl.checkpoint.source import INDEX, SINGLE, Checkpoint
from moectl.errors import InputError, MoectlError, UsageError
from moectl.evaluation.inspect import inspect
from moectl.families.config import normalised
from moectl.families.registry import DENSE
from moectl.families.shapes import expected_tensors
from moectl.upcycle.recipe import SCALES, SparseRecipe
from moectl.upcycle.sparse import plan_sparse

TRIES = 3
MEMORY_BYTES = 100_000_000
MESSAGE_CHARACTERS = 2000
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Raw(str):
    """Text that goes into a JSON document as it is, valid or not."""


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 127, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 10**4299, 0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "0", "2", "None", "true", "\x1b[31mred", "a\nb\tc", "\0", "\x7f\x9b", "\ud800", "\udc80", "\u202ex"),
    *("\u2028", "[bold]", "ü", "x" * 300, "x" * 20_000, "../x", "/etc/passwd", "C:\\x", "/dev/zero", "..", "."),
    *("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "full_attention", "sliding_attention"),
    *("silu", "gelu", "bfloat16", "float8_e4m3fn", "torch.float16", "llama", "mistral", "qwen2", "qwen3", "mixtral"),
    *([], [1], [[1]], [None], [0, 0], [1, 2, 3], ["x"], [{}], [math.nan], ["full_attention"] * 2, [1] * 1000, {}),
    *({"a": 1}, {"": None}, {"\x1b": "\x1b"}, {"rope_type": "yarn", "factor": "2"}, {"rope_theta": "x"}),
    *({"rope_type": ["yarn"]}, {"type": {}}, {"rope_theta": math.nan}, {"full_attention": {"rope_theta": 1.0}}),
    *({"quant_method": ["fp8"]}, {"quant_method": "fp8", "weight_block_size": "x"}, {"quant_method": "mxfp4"}),
    *({"quant_method": "compressed-tensors", "config_groups": [1]}, {"quant_method": "fp8"}),
    *({str(n): n for n in range(1000)}, {"quant_method": "gptq"}, {"num_hidden_layers": 10**9}),
    *(Raw("1e999"), Raw("-1e999"), Raw("1" * 5000), Raw("0x1"), Raw("tru"), Raw(""), Raw('"\\ud800"'), Raw("\x00")),
    *(Raw("[" * n + "]" * n) for n in (3, 60, 300, 700, 900, 950, 970, 980, 990, 100_000)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (3, 60, 300, 950, 970, 980, 985, 990, 995)),
)
KEYS = (
    *("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "quantization_config", "text_config", "dtype"),
    *("torch_dtype", "num_key_value_heads", "head_dim", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "architectures", "num_local_experts"),
    *("num_experts_per_tok", "num_experts", "auto_map", "trust_remote_code", "_attn_implementation", "eos_token_id"),
    *("rms_norm_eps", "hidden_act", "max_position_embeddings", "pad_token_id", "untied_head", "o_bias", "\x1b[2J"),
)


@dataclass(frozen=True)
class Case:
    """Files of a checkpoint directory by name, and what is asked of it."""

    files: dict[str, bytes]
    recipe: SparseRecipe = field(default_factory=lambda: SparseRecipe(experts=2, top_k=1))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: the error it was refused with (None: it was accepted), CPU seconds, bytes if measured."""

    error: MoectlError | None
    seconds: float
    peak_bytes: int | None


# ---- generators ---------------------------------------------------------------------------------------------


def tiny_config(family: str) -> dict[str, Any]:
    """A valid config of a model of a few hundred bytes that says everything a family can say."""
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    rest = {"architectures": [DENSE[family].architecture], "dtype": "float32", "max_position_embeddings": 64}
    layers = {"layer_types": ["full_attention"] * 2} if family == "olmo3" else {}  # its MoE has no windows
    return {"model_type": family, **DENSE[family].defaults, **sizes, **heads, **rest, **layers}


@cache
def tiny_header(family: str) -> tuple[dict[str, Any], bytes]:
    """Header and data of the weights of `tiny_config`."""
    entries, end = {}, 0
    for name, shape in expected_tensors(DENSE[family], normalised(DENSE[family], tiny_config(family))):
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    return entries, b"\0" * end


def tiny_files(family: str) -> dict[str, bytes]:
    entries, data = tiny_header(family)
    return {"config.json": as_json(tiny_config(family)), SINGLE: framed(as_json(entries), data)}


def odd(random: Random) -> Any:
    """One of `ODD`, a copy since it may be changed in its turn."""
    return deepcopy(random.choice(ODD))


def header_of_bytes(random: Random) -> Case:
    """A weight file of arbitrary bytes, or of a valid one with bytes flipped, cut, put in or doubled."""
    files = tiny_files("llama")
    whole = files[SINGLE]
    if random.random() < 0.3:
        prefix = random.choice([b"", b"{", b"PK", b"\x80\x02", b"version https://git-lfs", (9).to_bytes(8, "little")])
        files[SINGLE] = prefix + random.randbytes(random.choice([0, 1, 7, 8, 9, 60, 300]))
    elif random.random() < 0.5:
        length = random.choice([0, 1, 2, 7, 2**31, 2**32, 10**8, 2**63, 2**64 - 1, len(whole), len(whole) - 8])
        files[SINGLE] = length.to_bytes(8, "little") + whole[8:]
    else:
        files[SINGLE] = spoiled(random, whole)
    return Case(files)


def header(random: Random) -> Case:
    """A weight file whose header is a valid one with values, names, nesting, offsets or lengths changed."""
    family = random.choice(sorted(DENSE))
    entries, data = tiny_header(family)
    entries = {name: dict(entry) for name, entry in entries.items()}
    for _ in range(random.choice([1, 1, 2, 4])):
        name = random.choice(sorted(entries)) if entries else "x"
        entry = entries.get(name, {})
        what = random.randrange(8)
        if what == 0 and isinstance(entry, dict):
            entry[random.choice(["dtype", "shape", "data_offsets", "extra"])] = odd(random)
        elif what == 1 and isinstance(entry, dict):
            entry["data_offsets"] = [odd(random), odd(random)]
        elif what == 2 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            entry["shape"] = entry["shape"] + [odd(random)] * random.choice([1, 2, 20])
        elif what == 3:
            entries[name] = odd(random)
        elif what == 4:
            entries[str(odd(random))[:3000]] = entries.pop(name, {})
        elif what == 5:
            entries["__metadata__"] = random.choice([{}, {"format": "pt"}, {"a": 1}, odd(random)])
        elif what == 6 and isinstance(entry, dict):
            entry.pop(random.choice(["dtype", "shape", "data_offsets"]), None)
        else:
            entries.pop(name, None)
    text = as_json(entries)
    if random.random() < 0.2:
        text = text + b" " * random.choice([1, 8, 100_000])
    if random.random() < 0.1:
        text = spoiled(random, text)
    data = random.choice([data, data, data, data[:-1], data + b"\0", b""])
    return Case({**tiny_files(family), SINGLE: framed(text, data)})


def index(random: Random) -> Case:
    """Two shards with an index whose map, names or text was changed."""
    family = random.choice(sorted(DENSE))
    entries, data = tiny_header(family)
    files = {"config.json": as_json(tiny_config(family))}
    names = list(entries)
    weight_map: Any = {}
    for shard, part in zip(SHARDS, (names[:5], names[5:]), strict=True):
        begin, end = entries[part[0]]["data_offsets"][0], entries[part[-1]]["data_offsets"][1]
        moved = {n: {**entries[n], "data_offsets": [x - begin for x in entries[n]["data_offsets"]]} for n in part}
        files[shard] = framed(as_json(moved), data[begin:end])
        weight_map |= dict.fromkeys(part, shard)
    document: Any = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    for _ in range(random.choice([1, 1, 2])):
        what, name = random.randrange(8), random.choice(names)
        if what == 0:
            weight_map[name] = odd(random)
        elif what == 1:
            weight_map[name] = f"{odd(random)!s}"[:3000] + ".safetensors"
        elif what == 2:
            weight_map[str(odd(random))[:3000]] = random.choice(SHARDS)
        elif what == 3:
            weight_map.pop(name, None)
        elif what == 4:
            document[random.choice(["metadata", "weight_map", "x"])] = odd(random)
        elif what == 5:
            document["metadata"] = {"total_size": odd(random)}
        elif what == 6:
            files[random.choice(SHARDS)] = files[random.choice(SHARDS)]
        else:
            document = random.choice([document, odd(random)])
            break
    files[INDEX] = as_json(document)
    if random.random() < 0.1:
        files[INDEX] = spoiled(random, files[INDEX])
    if random.random() < 0.1:
        del files[random.choice(SHARDS)]
    return Case(files)


def config(random: Random) -> Case:
    """A config of any dense family with fields of a wrong type or size, missing, extra or nested."""
    family = random.choice(sorted(DENSE))
    files = tiny_files(family)
    document: Any = tiny_config(family)
    for _ in range(random.choice([1, 1, 1, 2, 3, 6])):
        keys = [*sorted(document), *KEYS]
        key = random.choice(keys)
        what = random.randrange(6)
        if what == 0:
            document.pop(key, None)
        elif what == 1:
            document[key] = [document.get(key)] * random.choice([0, 1, 2, 3])
        elif what == 2 and "rope" in key:
            document[key] = {"rope_type": odd(random), "factor": odd(random), "x": odd(random)}
        elif what == 3 and key == "layer_types":
            document[key] = [random.choice(["full_attention", "sliding_attention", odd(random)]) for _ in range(2)]
            document["use_sliding_window"] = True
        else:
            document[key] = odd(random)
    if random.random() < 0.1:  # a MoE, of which `inspect` counts active parameters
        entries, data = tiny_header(family)
        files[SINGLE] = framed(as_json({n.replace(".mlp.", ".mlp.experts.0."): e for n, e in entries.items()}), data)
        document |= {"num_experts": odd(random), "num_experts_per_tok": odd(random)}
    if random.random() < 0.03:
        document = odd(random)
    files["config.json"] = as_json(document)
    if random.random() < 0.1:
        files["config.json"] = spoiled(random, files["config.json"])
    return Case(files)


def provenance(random: Random) -> Case:
    """A moectl.json with tables of a wrong type, names that lead elsewhere, or broken text."""
    files = tiny_files("llama")
    tables: dict[str, Any] = {"files": {"config.json": "0" * 64}, "tensors": dict.fromkeys(tiny_header("llama")[0], "")}
    document: Any = {"schema": SCHEMA, "moectl": "0", "recipe": {}, "sources": [], "fingerprint": "", **tables}
    for _ in range(random.choice([1, 2])):
        table = random.choice(["files", "tensors"])
        what = random.randrange(4)
        if what == 0:
            document[random.choice(sorted(document))] = odd(random)
        elif what == 1 and isinstance(document[table], dict):
            document[table] = {**document[table], str(odd(random)): odd(random)}
        elif what == 2 and isinstance(document[table], dict):
            document[table] = {**document[table], random.choice([".", "..", "/", "a/b", SINGLE]): ""}
        else:
            document.pop(random.choice(["fingerprint", "sources", "moectl"]), None)
    files["moectl.json"] = as_json(document)
    if random.random() < 0.1:
        files["moectl.json"] = spoiled(random, files["moectl.json"])
    return Case(files)


def recipe(random: Random) -> Case:
    """A sound checkpoint of any dense family and a recipe out of its ranges."""
    numbers = [x for x in ODD if type(x) is int]
    floats = [x for x in ODD if type(x) in (int, float)]
    words = ["auto", "float32", "float64", "mixtral", "qwen2_moe", "qwen3_moe", *(x for x in ODD if type(x) is str)]
    sound = SparseRecipe(experts=random.choice([1, 2, 3]), top_k=1)
    changes = {
        "experts": [*numbers, 4, 6],
        "top_k": numbers,
        "granularity": numbers,
        "scale": [*SCALES, *words],
        "layers": ["every:2", "last:1", "0", "1,0", "0,,1", "every:0", f"every:{'9' * 5000}", "9" * 5000, "-1", *words],
        "shared_experts": [True, False],
        "shuffle": [True, False],
        "drop": floats,
        "reinit": floats,
        "into": [None, *words],
        "router_std": floats,
        "noise": floats,
        "aux_loss_coef": floats,
        "dtype": words,
        "seed": numbers,
        "shard_bytes": [*numbers, 100, 1000],
    }
    chosen = random.choice([1, 1, 2, 3])
    names = [random.choice(sorted(changes)) for _ in range(chosen)]
    drawn = replace(sound, **{name: random.choice(changes[name]) for name in names})
    return Case(tiny_files(random.choice(sorted(DENSE))), drawn)


GENERATORS: dict[str, Callable[[Random], Case]] = {
    "header_of_bytes": header_of_bytes,
    "header": header,
    "index": index,
    "config": config,
    "provenance": provenance,
    "recipe": recipe,
}


def as_json(value: Any) -> bytes:
    """`value` as JSON text in which `Raw` strings stand as they are."""
    raws: list[Raw] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Raw):
            raws.append(item)
            return f"@raw{len(raws) - 1}@"
        if isinstance(item, dict):
            return {key: marked(inner) for key, inner in item.items()}
        return [marked(inner) for inner in item] if isinstance(item, list) else item

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


def framed(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def spoiled(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, put in or doubled at one place."""
    place = random.randrange(len(content) + 1)
    extra = random.choice([b"\0", b"\xff", b'"', b"{", b"}", b"[", b",", b"-", b"9" * 5000, b"\xed\xa0\x80", b" "])
    ways = (
        content[:place],
        content[:place] + extra + content[place:],
        content[:place] + extra + content[place + 1 :],
        content[:place] + content[place + random.choice([1, 4, 40]) :],
        content[:place] * 2 + content[place:],
    )
    return random.choice(ways)


# ---- the property -------------------------------------------------------------------------------------------


def check(case: Case, directory: Path, *, measure_memory: bool = False) -> Outcome:
    """Do with the case all that reads no weights; raises AssertionError (or what escaped) unless it ends as it should.

    It works, or a `MoectlError` names a file in printable words; within `SECONDS` of CPU and `MEMORY_BYTES`.
    """
    for old in directory.iterdir():
        old.unlink()
    for name, content in case.files.items():
        (directory / name).write_bytes(content)
    if measure_memory:
        outcome = measured(directory, case)
    else:
        error, seconds = least_cpu_seconds(lambda: refusal(directory, case))
        outcome = Outcome(error, seconds, None)
    if (error := outcome.error) is not None:
        assert isinstance(error, InputError | UsageError), f"{type(error).__name__}: {error}"
        for line in error.lines():
            assert line.isprintable(), f"control characters: {line!r}"
            assert len(line) <= MESSAGE_CHARACTERS, f"{len(line)} characters: {line[:200]}..."
        named = any(name in error.what for name in (*case.files, directory.name))
        assert named or isinstance(error, UsageError), f"names no file: {error.what}"
    assert measure_memory or outcome.seconds < SECONDS, f"took {outcome.seconds:.2f} s"
    assert outcome.peak_bytes is None or outcome.peak_bytes < MEMORY_BYTES, f"took {outcome.peak_bytes} bytes"
    return outcome


def measured(directory: Path, case: Case) -> Outcome:
    """With the peak of Python's memory, which takes several times as long."""
    started = time.thread_time()
    tracemalloc.start()
    try:
        error = refusal(directory, case)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Outcome(error, time.thread_time() - started, peak)


def refusal(directory: Path, case: Case) -> MoectlError | None:
    """What the case is refused with; None if it is accepted."""
    try:
        use(directory, case)
    except MoectlError as refused:
        return refused
    return None


def use(directory: Path, case: Case) -> None:
    """Open, inspect, plan, and (where there is one) read the provenance; every report must be JSON."""
    checkpoint = Checkpoint.open(directory)
    for warning in checkpoint.warnings:
        assert len(warning) <= MESSAGE_CHARACTERS and warning.isprintable(), warning[:200]
    json.dumps(inspect(checkpoint).to_json(), allow_nan=False)
    if "moectl.json" in case.files:
        read_provenance(directory)
        verify_hashes(checkpoint)
    plan = plan_sparse(checkpoint, case.recipe)
    json.dumps(plan.to_json(), allow_nan=False)
    assert plan.fingerprint and all(shard.nbytes > 0 for shard in plan.shards)
    for text in plan.text_files.values():
        text.encode()
    json.dumps(dict(plan.facts), allow_nan=False)
