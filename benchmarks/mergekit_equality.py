"""Is what moectl makes of a mergekit-moe config, bit for bit, what mergekit makes of it, but for the router?

Each case is a YAML file that both programs get as it is. mergekit writes fused experts; they are taken apart here by
the order transformers fuses them in, and every tensor but the router's is compared. mergekit has to be installed in an
environment of its own (pip install mergekit==0.1.5), since it wants other versions of many packages.

    python benchmarks/mergekit_equality.py --mergekit VENV/bin/mergekit-moe
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import command, machine

from moectl.checkpoint.source import Checkpoint
from moectl.data.tokens import byte_tokenizer
from moectl.families.registry import MOE
from moectl.families.spec import GatedMlp
from moectl.families.tiny import tiny_model

RESULTS = Path(__file__).parent / "results" / "mergekit_equality.json"
EXPERTS = 4
SIZES: dict[str, Any] = {"vocab_size": 258, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3}
PAIRS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
CASES = [
    (dense, mode, dtype, written)
    for dense in PAIRS
    for mode in ("random", "hidden")
    for dtype, written in (("bfloat16", None), ("float32", "bfloat16"), ("float32", None))
]


def main() -> None:
    """Run every case, print a line for each and write all as JSON; exit with 1 if a tensor differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", required=True, help="the mergekit-moe program of an environment that has it")
    program = Path(parser.parse_args().mergekit)
    rows = []
    for dense, mode, dtype, written in CASES:
        with tempfile.TemporaryDirectory() as folder:
            row = compared(Path(folder), program, dense, mode, dtype, written)
        rows.append(row)
        print(row)
    result = {
        "schema": "moectl.mergekit_equality/1",
        "command": command(),
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "mergekit": mergekit_version(program),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    bad = [row for row in rows if row["different"] or row["missing"] or row["unexpected"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} cases are equal bit for bit -> {RESULTS}")
    sys.exit(bool(bad))


def compared(folder: Path, mergekit: Path, dense: str, mode: str, dtype: str, written: str | None) -> dict[str, Any]:
    """One case: both programs on one config."""
    for number in range(EXPERTS):
        model = tiny_model(dense, seed=number, **SIZES, sliding_window=None) if dense == "mistral" else None
        model = model or tiny_model(dense, seed=number, **SIZES)
        model.to(getattr(torch, dtype)).save_pretrained(folder / str(number))
        byte_tokenizer().save_pretrained(folder / str(number))
    config: dict[str, Any] = {
        "base_model": str(folder / "0"),
        "gate_mode": mode,
        "experts": [
            {"source_model": str(folder / str(number)), "positive_prompts": [f"text number {number}", "more of it"]}
            for number in range(EXPERTS)
        ],
    }
    if written:
        config["dtype"] = written
    (folder / "config.yml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    run(str(mergekit), str(folder / "config.yml"), str(folder / "theirs"), "--device", "cpu")
    moectl = str(Path(sys.executable).with_name("moectl"))
    run(moectl, "upcycle", "btx", "--recipe", str(folder / "config.yml"), "-o", str(folder / "ours"), "--quiet")
    ours = Checkpoint.open(folder / "ours")
    theirs = dict(unfused(Checkpoint.open(folder / "theirs"), PAIRS[dense]))
    router = MOE[PAIRS[dense]].router.partition("{layer}.")[2]
    names = {name for name in ours.tensors if not name.endswith(router)}
    both = names & theirs.keys()
    different = sorted(
        name
        for name in both
        if ours.read(name).dtype != theirs[name].dtype or ours.read(name).tobytes() != theirs[name].tobytes()
    )
    return {
        "dense": dense,
        "moe": PAIRS[dense],
        "gate_mode": mode,
        "source_dtype": dtype,
        "config_dtype": written,
        "tensors": len(both),
        "bytes": sum(ours.tensors[name].nbytes for name in both),
        "different": different,
        "missing": sorted(theirs.keys() - names),
        "unexpected": sorted(names - theirs.keys()),
    }


def unfused(theirs: Checkpoint, family: str) -> Iterator[tuple[str, np.ndarray]]:
    """mergekit's tensors under the names of the disk: gate above up, stacked over experts; routers left out."""
    mlp = MOE[family].mlp
    assert isinstance(mlp, GatedMlp)
    for name in theirs.tensors:
        value = theirs.read(name)
        if name.endswith(".experts.gate_up_proj"):
            layer = int(name.split(".")[2])
            for expert, both in enumerate(value):
                gate, up = np.split(both, 2)
                yield mlp.gate.format(layer=layer, expert=expert), gate
                yield mlp.up.format(layer=layer, expert=expert), up
        elif name.endswith(".experts.down_proj"):
            layer = int(name.split(".")[2])
            for expert, down in enumerate(value):
                yield mlp.down.format(layer=layer, expert=expert), down
        elif not name.endswith(".gate.weight"):
            yield name, value


def run(*words: str) -> None:
    """Run a program to its end; what it said is shown if it failed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(words[0]).name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def mergekit_version(program: Path) -> str:
    """The version that is installed beside the program."""
    ask = "from importlib.metadata import version; print(version('mergekit'))"
    python = program.with_name("python")
    return subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
