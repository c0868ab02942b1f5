"""Peak memory of `moectl compress qmoe`'s pipeline: that of a layer, however many there are.

    OMP_NUM_THREADS=1 python benchmarks/compress.py [--layers 4] [--bits 4] [--hidden 512] [--out results.json]

A random Qwen3-MoE in bfloat16 on disk, computed in float32 on the CPU, its dense part stored in 8 bits. Each run is a
process of its own: with so many layers, with twice as many, with as many tokens again, and with twice as many under a
limit on its address space: what it has mapped after its imports and compilations, and less than the model. Peak is
VmHWM of the process, 570 MB of which are those imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import command, machine, run
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from moectl.checkpoint.source import Checkpoint
from moectl.compress.dense import DensePart
from moectl.compress.pipeline.preflight import estimate
from moectl.compress.pipeline.run import run as compress
from moectl.compress.pipeline.settings import Settings
from moectl.compress.quantise.method import Method, method
from moectl.layerwise.malloc import keep_little
from moectl.layerwise.memory import resident

MB = 1 << 20
VOCABULARY = 2048


def save(path: Path, layers: int, experts: int, hidden: int) -> dict[str, int]:
    """Write a random model, a layer's weights repeated in every layer; how many bytes it has in float32."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return {"model_bytes": 4 * model.num_parameters(), "layer_bytes": 4 * layer}


def _warm_up(how: Method) -> None:
    """Import and compile what the first use of codes and of the dense part imports and compiles."""
    piece = how.quantise(torch.randn(1, 64, 64), None, None)
    how.store("x", piece, transposed=False, stacked=True)
    DensePart(8, torch.bfloat16).take("x.0", torch.nn.Linear(64, 64))


def child(model: Path, sequences: int, limit: int, bits: float | None) -> None:
    """What one process does: compress, and print what it took."""
    source = Checkpoint.open(model)
    how = method(bits, dtype=torch.bfloat16)
    _warm_up(how)
    settings = Settings(dense=DensePart(8, torch.bfloat16), micro_batch=4, batch_experts=8)
    token_BL = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, 128))
    keep_little()
    before = resident("VmRSS") or 0
    expected = estimate(source, token_BL, how, settings)
    if limit:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
    with tempfile.TemporaryDirectory() as place:
        started, used = time.perf_counter(), time.process_time()
        files = compress(source, token_BL, how, settings, Path(place))
        found = {
            "peak_bytes": resident("VmHWM") or 0,
            "imported_bytes": before,
            "expected_bytes": expected.memory,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - used,
            "expected_seconds": expected.seconds,
            "output_bytes": sum(file.stat().st_size for file in files),
            "expected_output_bytes": expected.output,
        }
    print(json.dumps(found))


def measure(model: Path, sequences: int, limit: int, bits: float | None) -> dict[str, Any]:
    """One process."""
    # A thread's malloc arena reserves 64 MiB of addresses that are never touched; a limit would be mostly about those.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"} if limit else dict(os.environ)
    finished = run(
        [sys.executable, __file__, "--child", str(model), str(sequences), str(limit), str(bits or 0)], env=environment
    )
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--bits", type=float, help="2, 3 or 4 for uniform grids; ternary if left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), int(options.child[1]), int(options.child[2]), float(options.child[3]) or None)
        return
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        small = save(few, options.layers, options.experts, options.hidden)
        large = save(many, 2 * options.layers, options.experts, options.hidden)
        limit = large["model_bytes"] * 7 // 8
        for name, model, sequences, most in (
            (f"{options.layers} layers", few, options.sequences, 0),
            (f"{2 * options.layers} layers", many, options.sequences, 0),
            (f"{options.layers} layers, twice the tokens", few, 2 * options.sequences, 0),
            (f"{2 * options.layers} layers within {limit / MB:,.0f} MB", many, options.sequences, limit),
        ):
            rows.append({"what": name, **measure(model, sequences, most, options.bits)})
            row = rows[-1]
            print(
                f"{name:32} peak {row['peak_bytes'] / MB:6,.0f} MB (expected {row['expected_bytes'] / MB:6,.0f})  "
                f"after imports {(row['peak_bytes'] - row['imported_bytes']) / MB:5,.0f} MB  "
                f"{row['seconds']:6.1f} s (expected {row['expected_seconds']:6.1f})  "
                f"model {(large if model == many else small)['model_bytes'] / MB:6,.0f} MB"
            )
    ratio = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"layer {small['layer_bytes'] / MB:,.0f} MB; twice the layers take {ratio:.3f} of the memory")
    if options.out:
        document = {
            "schema": "moectl.benchmark.compress/1",
            "command": command(),
            "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
            **{key: vars(options)[key] for key in ("layers", "experts", "hidden", "sequences", "bits")},
            "few": small,
            "many": large,
            "limit_bytes": limit,
            "rows": rows,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
