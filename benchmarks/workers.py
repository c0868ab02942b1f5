"""Two workers against one on the same plan of computed tensors: what `--worker K/2` gains on two cores.

    python benchmarks/workers.py [--rounds 3] [--hidden 768] [--layers 8] [--dir DIR] [--out workers.json]

A random bf16 Llama (100M parameters) becomes 4 experts with --noise 0.01: every expert weight is drawn and rounded,
so the time goes into computing and not into the disk. Each round runs one process with the whole plan, then two
processes with half of the shards each; the wall time of the two is that of the last to end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import command, machine, run
from upcycle import MOECTL, build_dense, llama_config, settle

NEEDED = 0.75


def upcycle(dense: Path, out: Path, shard_bytes: int, *extra: str) -> list[str]:
    recipe = ["--experts", "4", "--noise", "0.01", "--shard-size", str(shard_bytes), "--quiet"]
    return [MOECTL, "upcycle", "sparse", str(dense), "-o", str(out), *recipe, *extra]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".json"}


def measure(work: Path, rounds: int, config: dict[str, Any], shard_bytes: int) -> dict[str, Any]:
    dense = build_dense(work / "dense", config)
    one, two = work / "one", work / "two"
    rows = []
    for _ in range(rounds):
        settle(one, two)
        alone = run(upcycle(dense, one, shard_bytes))
        settle()
        with ThreadPoolExecutor(2) as pool:
            pair = list(pool.map(run, [upcycle(dense, two, shard_bytes, "--worker", f"{k}/2") for k in (1, 2)]))
        # moectl.json holds the hash of every tensor: equal provenance is equal weights.
        assert files(one) == files(two), "two workers made other bytes than one"
        wall = max(child.wall for child in pair)
        rows.append({"one": alone.wall, "two": wall, "ratio": wall / alone.wall})
    return {
        "dense_bytes": (dense / "model.safetensors").stat().st_size,
        "bytes_written": sum(path.stat().st_size for path in one.glob("*.safetensors")),
        "shards": len(list(one.glob("*.safetensors"))),
        "rounds": rows,
        "ratio": statistics.median(row["ratio"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-bytes", type=int, default=16_000_000, help="small, so that the shares are equal")
    parser.add_argument("--dir", type=Path, default=Path("benchmarks/scratch"), help="scratch directory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/workers.json"))
    options = parser.parse_args()
    shutil.rmtree(options.dir, ignore_errors=True)
    options.dir.mkdir(parents=True)
    try:
        config = llama_config(options.hidden, 4 * options.hidden, options.layers, 8, vocabulary=16000)
        measured = measure(options.dir.resolve(), options.rounds, config, options.shard_bytes)
        result = {"command": command(), "machine": machine(), **measured}
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rounds"]:
        print(f"one worker {row['one']:6.2f} s   two {row['two']:6.2f} s")
    print(f"two / one   {result['ratio']:.2f}   (needed: at most {NEEDED})")


if __name__ == "__main__":
    main()
