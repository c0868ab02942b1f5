"""PESC against one adapter of the same active size and LoRA of the same trainable size, on three domains.

    python benchmarks/pesc.py

A byte-level Llama is trained on docstrings alone and frozen; each method then learns the built-in code, prose and
arithmetic together, on the same batches. Each method's learning rate is the better of two on a seed of its own; then
it runs with the other seeds. The result is the held-out loss in nats per byte, with mean and range over the seeds.

`--methods` runs some of them and keeps what OUT has of the others, made with the same steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import machine
from peft import LoraConfig, PeftConfig, get_peft_model
from plain_loop import train
from transformers import LlamaForCausalLM

from moectl.data.documents import read_documents
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer, token_batches
from moectl.evaluation.heldout import heldout_batches, heldout_loss
from moectl.integrations.pesc import PescConfig
from moectl.training.byte_llama import DATA, byte_llama_config

LENGTH = 256
BATCH = 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("pesc", "one adapter", "lora", "pesc + lora")
TUNING_SEED = 100
SEEDS = (0, 1, 2)
RATES = (3e-3, 1e-2)


def config_of(method: str) -> PeftConfig:
    """8 adapters of width 32, 2 of them active; one of width 64; LoRA as large as all eight; and half of each."""
    if method == "pesc":
        return PescConfig(task_type="CAUSAL_LM", num_experts=8, top_k=2, adapter_dim=32)
    if method == "one adapter":
        return PescConfig(task_type="CAUSAL_LM", num_experts=1, top_k=1, adapter_dim=64, aux_loss_coef=0.0)
    if method == "pesc + lora":  # as the paper trains it
        return PescConfig(
            task_type="CAUSAL_LM", num_experts=8, top_k=2, adapter_dim=16,
            lora_r=14, lora_alpha=28, lora_target_modules=LINEAR,
        )  # fmt: skip
    return LoraConfig(task_type="CAUSAL_LM", r=29, lora_alpha=58, target_modules=LINEAR)


def batches_of(specs: tuple[str, ...], encode: Any, seed: int, steps: int) -> list[Any]:
    """The first `steps` training batches of a seed."""
    packed = token_batches(
        read_documents(specs, "train"),
        encode,
        eos_id=BYTE_EOS_ID,
        sequence_length=LENGTH,
        batch_size=BATCH,
        seed=seed,
        repeat=True,
    )
    return list(islice(packed, steps))


def learned(base: LlamaForCausalLM, method: str, rate: float, seed: int, batches: Any, heldout: Any) -> dict[str, Any]:
    """One run: train a method's adapter on a copy of the base, and measure it."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config_of(method))
    trainable, _ = model.get_nb_trainable_parameters()
    start = time.process_time()
    losses = train(
        model, batches, steps=len(batches), learning_rate=rate, warmup=len(batches) // 10, weight_decay=0.0
    )  # fmt: skip
    row = {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "trainable": trainable,
        "train_loss": sum(losses[-10:]) / 10,
        "cpu_seconds": time.process_time() - start,
        "heldout": heldout_loss(model, heldout),
    }
    model.train()
    if method.startswith("pesc"):
        model(input_ids=torch.from_numpy(batches[-1]))
        row["balance_per_layer"] = [loss.item() for loss in model.aux_losses()]
    print(
        f"{method:11} seed {seed:3} lr {rate:g}  {row['heldout']['mean']:.4f}  {row['cpu_seconds']:.0f} s", flush=True
    )
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and largest held-out loss of a method, for each domain and their mean."""
    columns = {name: [row["heldout"][name] for row in rows] for name in rows[0]["heldout"]}
    return {
        name: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        for name, values in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=150, help=f"of {BATCH * LENGTH} bytes, on prose")
    parser.add_argument("--steps", type=int, default=80, help=f"of {BATCH * LENGTH} bytes, on all three domains")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pesc.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    encode = byte_tokenizer().encode
    heldout = heldout_batches(
        DATA, encode, eos_id=BYTE_EOS_ID, sequence_length=LENGTH, batch_size=BATCH, max_batches=8
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(byte_llama_config())
    prose = batches_of(("builtin:prose",), encode, 0, options.base_steps)
    train(base, prose, steps=len(prose), learning_rate=3e-3, warmup=len(prose) // 10)
    before = heldout_loss(base, heldout)
    print(f"base: {before['mean']:.4f}", flush=True)
    data = {seed: batches_of(DATA, encode, seed, options.steps) for seed in (TUNING_SEED, *SEEDS)}
    settings = {"base_steps": options.base_steps, "steps": options.steps, "tokens_per_step": BATCH * LENGTH}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    if {name: kept.get(name) for name in settings} != settings:
        kept = {}
    asked = options.methods.split(",")
    methods = {name: found for name, found in kept.get("methods", {}).items() if name not in asked}
    tuning, rows = ([row for row in kept.get(name, []) if row["method"] in methods] for name in ("tuning", "runs"))
    for method in asked:
        tried = [learned(base, method, rate, TUNING_SEED, data[TUNING_SEED], heldout) for rate in RATES]
        tuning += tried
        rate = min(tried, key=lambda row: row["heldout"]["mean"])["learning_rate"]
        runs = [learned(base, method, rate, seed, data[seed], heldout) for seed in SEEDS]
        rows += runs
        methods[method] = {"trainable": runs[0]["trainable"], "learning_rate": rate, "heldout": summary(runs)}
    result = {
        "command": "python benchmarks/pesc.py",
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **settings,
        "base_heldout": before,
        "methods": methods,
        "tuning": tuning,
        "runs": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for method, found in methods.items():
        mean = found["heldout"]["mean"]
        print(f"{method:11} {found['trainable']:8,}  {mean['mean']:.4f} ({mean['min']:.4f}-{mean['max']:.4f})")
    print(f"{time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
