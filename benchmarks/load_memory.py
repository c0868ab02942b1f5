"""Memory of loading a model to train over several processes: whole and then sharded, or in pieces from the start.

    OMP_NUM_THREADS=1 python benchmarks/load_memory.py [--processes 4] [--layers 12] [--rounds 2] [--out results.json]

A random Mixtral in bfloat16 on disk (by default 12 layers of 8 experts, 512 wide), float32 in memory, on the CPU with
gloo. Each way is one torchrun, in turn. Peak is the most private memory (RssAnon, read every 5 ms) of a process above
what it had after its imports; pages of a mapped file, which the system can take back, are not in it. The table gives
the largest process over the rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from moectl.checkpoint.source import Checkpoint
from moectl.layerwise.skeleton import decoder_layers
from moectl.training.model import load_model
from moectl.training.sharded import load_sharded
from moectl.training.world import World, joined

MB = 1 << 20


def load_whole(source: Checkpoint, world: World) -> Any:
    """Every process loads all of it, then keeps its pieces."""
    model = load_model(source)
    world.shard(model, decoder_layers(source, model)[1], set())
    return model


WAYS = {"whole": load_whole, "in pieces": load_sharded}


def private() -> int:
    """Bytes of memory that only this process has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load(model: Path, way: str, out: Path) -> None:
    """What one process of torchrun does: load, and write what it took."""
    source, peak, done = Checkpoint.open(model), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private())

    with joined("cpu") as world:
        world.barrier()
        before = private()
        watcher = threading.Thread(target=watch)
        watcher.start()
        loaded = WAYS[way](source, world)
        done.set()
        watcher.join()
        pieces = sum(parameter.to_local().nbytes for parameter in loaded.parameters())
        found = {"peak_bytes": peak - before, "pieces_bytes": pieces}
        (out / f"{world.rank}.json").write_text(json.dumps(found))
        del loaded  # before the process group it refers to
        world.barrier()


def measure(model: Path, way: str, processes: int) -> list[dict[str, int]]:
    """One torchrun of a way: what each process found."""
    with tempfile.TemporaryDirectory() as out:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([*launcher, __file__, "--load", str(model), way, out], check=True)
        return [json.loads(path.read_text()) for path in sorted(Path(out).iterdir())]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(Path(options.load[0]), options.load[1], Path(options.load[2]))
        return
    logging.disable_progress_bar()
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        num_local_experts=8,
    )
    net = MixtralForCausalLM(config).to(torch.bfloat16)
    layer = 4 * sum(parameter.numel() for parameter in net.model.layers[0].parameters())
    total = 4 * net.num_parameters()
    rows = []
    with tempfile.TemporaryDirectory() as model:
        net.save_pretrained(model)
        del net
        found: dict[str, list[dict[str, int]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way] += measure(Path(model), way, options.processes)
    for way, processes in found.items():
        row = {key: max(process[key] for process in processes) for key in processes[0]}
        rows.append({"way": way, **row})
        print(
            f"{way:10} peak {row['peak_bytes'] / MB:7,.0f} MB  pieces {row['pieces_bytes'] / MB:6,.0f} MB  "
            f"(model {total / MB:,.0f} MB, layer {layer / MB:,.0f} MB)"
        )
    if options.out:
        document = {
            "schema": "moectl.benchmark.load_memory/1",
            "command": command(),
            "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
            "processes": options.processes,
            "rounds": options.rounds,
            "model_bytes": total,
            "layer_bytes": layer,
            "rows": rows,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
