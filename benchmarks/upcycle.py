"""Sparse upcycling at disk speed: raw copy, `moectl upcycle sparse` and mergekit-moe, in turn, in one run.

    python benchmarks/upcycle.py [--rounds 3] [--mergekit VENV] [--dir DIR] [--out results.json]

Builds a random 317M-parameter bf16 Llama (hidden 1024, intermediate 4096, 16 layers, vocabulary 32000) and turns
it into 8 experts: 3.45 GB written. VENV is a virtual environment with mergekit 0.1.5; without it that row is
reported as not measured. Then the peak memory for a 4x larger model, and a sparse 1 TB checkpoint that is only planned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from machine import command, machine, run

from moectl.checkpoint.expressions import Init
from moectl.checkpoint.plan import OutputTensor, Plan
from moectl.checkpoint.writer import write
from moectl.data.tokens import byte_tokenizer
from moectl.families.config import normalised
from moectl.families.llama import LLAMA
from moectl.families.shapes import expected_tensors

MOECTL = str(Path(sys.executable).with_name("moectl"))
MERGEKIT_CONFIG = """\
base_model: {dense}
gate_mode: random
dtype: bfloat16
experts_per_token: 2
experts:
{experts}
"""


def llama_config(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def build_dense(directory: Path, config: dict[str, Any]) -> Path:
    """A random bf16 Llama, written by moectl's own writer from a plan of nothing but Init."""
    tensors = [
        OutputTensor(name, "BF16", shape, Init(shape, 0.02, name))
        for name, shape in expected_tensors(LLAMA, normalised(LLAMA, config))
    ]
    write(Plan((), tuple(tensors), {"method": "random"}, config, shard_bytes=10**12), directory)
    (directory / "moectl.json").unlink()
    return directory


def build_sparse(directory: Path, config: dict[str, Any], shard_bytes: int = 5 * 10**9) -> int:
    """A checkpoint whose weights are holes (ftruncate): any size on any disk. Returns its bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = [
        OutputTensor(name, "BF16", shape, Init(shape, 0.0, name))
        for name, shape in expected_tensors(LLAMA, normalised(LLAMA, config))
    ]
    plan = Plan((), tuple(tensors), {}, config, shard_bytes=shard_bytes)
    for shard in plan.shards:
        with (directory / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (directory / "model.safetensors.index.json").write_text(plan.text_files["model.safetensors.index.json"])
    return plan.file_bytes


def raw_copy(source: Path, target: Path, nbytes: int) -> float:
    """The floor: copy as many bytes from the source's file, around and around, and force them to the disk."""
    started = time.perf_counter()
    reader, writer = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    size, done = os.fstat(reader).st_size, 0
    while done < nbytes:
        offset = done % size
        done += os.copy_file_range(reader, writer, min(size - offset, nbytes - done, 1 << 26), offset)
    os.fsync(writer)
    os.close(reader)
    os.close(writer)
    return time.perf_counter() - started


def settle(*paths: Path) -> None:
    """Remove outputs and let the disk finish, so that no method pays for another's writing."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()
    time.sleep(1)


def compare_speed(work: Path, rounds: int, mergekit: Path | None) -> dict[str, Any]:
    dense = build_dense(work / "dense", llama_config(1024, 4096, 16, 16))
    byte_tokenizer().save_pretrained(dense)  # mergekit-moe does not start without one
    weights = dense / "model.safetensors"
    out, copy, merged = work / "moe", work / "copy", work / "merged"
    experts = "\n".join(f"  - source_model: {dense}" for _ in range(8))
    (work / "mergekit.yaml").write_text(MERGEKIT_CONFIG.format(dense=dense, experts=experts))
    rows: dict[str, list[dict[str, float]]] = {"raw copy": [], "moectl": [], "mergekit-moe": []}
    settle()
    for round_number in range(rounds):
        ours = run([MOECTL, "upcycle", "sparse", str(dense), "-o", str(out), "--experts", "8", "--quiet"])
        nbytes = (out / "model.safetensors").stat().st_size
        settle(out)
        floor = raw_copy(weights, copy, nbytes)
        settle(copy)
        if round_number:  # the first round warms the page cache
            rows["moectl"].append({"seconds": ours.wall, "cpu_seconds": ours.cpu, "peak_rss": ours.peak_rss})
            rows["raw copy"].append({"seconds": floor})
        if mergekit is not None and round_number:
            arguments = [str(mergekit / "bin" / "mergekit-moe"), str(work / "mergekit.yaml"), str(merged)]
            theirs = run([*arguments, "--i-understand-this-is-not-useful-without-training", "--quiet"])
            rows["mergekit-moe"].append(
                {"seconds": theirs.wall, "cpu_seconds": theirs.cpu, "peak_rss": theirs.peak_rss}
            )
            settle(merged)
    settle(dense)
    medians = {name: statistics.median(row["seconds"] for row in runs) for name, runs in rows.items() if runs}
    ratios = [o["seconds"] / f["seconds"] for o, f in zip(rows["moectl"], rows["raw copy"], strict=True)]
    return {
        "bytes_written": nbytes,
        "runs": rows,
        "median_seconds": medians,
        "moectl_over_raw_copy": statistics.median(ratios),
        "mergekit_over_moectl": medians["mergekit-moe"] / medians["moectl"] if "mergekit-moe" in medians else None,
    }


def compare_memory(work: Path) -> dict[str, Any]:
    """Peak memory for the model and for one 4x as large, copied and computed."""
    peaks = {}
    for label, config in (("317M", llama_config(1024, 4096, 16, 16)), ("1.1B", llama_config(2048, 8192, 16, 32))):
        dense = build_dense(work / "dense", config)
        for kind, extra in (("copied", []), ("with --noise", ["--noise", "0.01", "--experts", "2"])):
            arguments = [MOECTL, "upcycle", "sparse", str(dense), "-o", str(work / "moe"), "--quiet", *extra]
            peaks[f"{label} {kind}"] = run(arguments).peak_rss
            settle(work / "moe")
        settle(dense)
    return peaks


def plan_terabyte(work: Path) -> dict[str, Any]:
    """Open, plan and dry-run a 1 TB checkpoint of sparse files."""
    nbytes = build_sparse(work / "huge", llama_config(16384, 53248, 156, 128, vocabulary=128256))
    measured = run([MOECTL, "upcycle", "sparse", str(work / "huge"), "-o", str(work / "moe"), "--dry-run", "--json"])
    planned = json.loads(measured.stdout)
    settle(work / "huge")
    return {
        "source_bytes": nbytes,
        "planned_bytes": planned["bytes"],
        "seconds": measured.wall,
        "peak_rss": measured.peak_rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="the first one warms up and is not counted")
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit 0.1.5")
    parser.add_argument("--dir", type=Path, default=Path("benchmarks/scratch"), help="scratch directory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycle.json"))
    options = parser.parse_args()
    shutil.rmtree(options.dir, ignore_errors=True)
    options.dir.mkdir(parents=True)
    try:
        work = options.dir.resolve()
        result = {
            "command": command(),
            "machine": machine(),
            "speed": compare_speed(work, options.rounds, options.mergekit),
            "peak_rss": compare_memory(work),
            "terabyte": plan_terabyte(work),
        }
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    speed = result["speed"]
    for name, seconds in speed["median_seconds"].items():
        print(f"{name:14s} {seconds:7.2f} s")
    print(f"moectl / raw copy        {speed['moectl_over_raw_copy']:.2f}   (needed: at most 1.5)")
    slower = speed["mergekit_over_moectl"]
    print(f"mergekit-moe / moectl    {slower:.2f}   (needed: at least 4)" if slower else "mergekit-moe   not measured")
    for name, peak in result["peak_rss"].items():
        print(f"peak RSS {name:20s} {peak / 1e6:6.0f} MB   (needed: at most 300)")
    huge = result["terabyte"]
    print(f"1 TB dry run   {huge['seconds']:.2f} s, {huge['peak_rss'] / 1e6:.0f} MB   (needed: 10 s, 300 MB)")


if __name__ == "__main__":
    main()
