"""Training throughput: moectl's loop and transformers.Trainer on the same tiny MoE, in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/train.py [--rounds 3] [--steps 12] [--device cpu] [--out results.json]

A random Mixtral (by default hidden 128, 5 layers, 8 experts of width 352, top 2, byte vocabulary), batches of 16 x 256
tokens of Python's own source, float32 (or --dtype bfloat16: autocast in both), AdamW, clipping, the language model's
loss and a balancing loss. Both read the same sequences, each through its own data path. Each row is a loop with an
experts implementation; tokens/s is over all steps after the first three of a run, and the table gives the median over
rounds and the range. On a CPU a second is one of the process's own processor time, so that other programs do not
count; with one thread that is the wall clock of a machine of its own. MFU: the same estimate of FLOPs for all, over the
speed of a large matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from moectl.checkpoint.source import Checkpoint
from moectl.data.mixture import mixture_rows
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.integrations.transformers import NAME
from moectl.training.metrics import flops_per_token, matmul_speed
from moectl.training.recipe import TrainRecipe
from moectl.training.routers import moe_blocks
from moectl.training.run import Reporting, train
from moectl.training.world import World

SKIPPED = 3
DATA = "builtin:code"


def make_model(options: argparse.Namespace) -> MixtralForCausalLM:
    """The model, from a seed."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=BYTE_EOS_ID,
        sliding_window=None,
    )
    return MixtralForCausalLM(config)


class Clock(TrainerCallback):
    """Seconds of each step: from the end of one to the end of the next, data included."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device
        self.now = time.process_time if options.device == "cpu" else time.perf_counter
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step ends here, or the first begins."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.ends.append(self.now())

    def steps(self) -> list[float]:
        """What each step took."""
        return [later - earlier for earlier, later in pairwise(self.ends)]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.tick()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()


def ours(model: Path, options: argparse.Namespace, experts: str, work: Path) -> list[float]:
    """Seconds of each step of `moectl train`."""
    recipe = TrainRecipe(
        data=(DATA,),
        steps=options.steps,
        batch_size=options.batch,
        sequence_length=options.length,
        dtype=options.dtype,
        implementation=experts,
    )
    clock = Clock(options)
    with tempfile.TemporaryDirectory(dir=work) as out:
        train(
            Checkpoint.open(model),
            recipe,
            Path(out) / "out",
            World(0, 1, torch.device(options.device)),
            save_every=10**9,
            reporting=Reporting(lambda _facts: clock.tick(), lambda _metrics: clock.tick()),
        )
    return clock.steps()


def theirs(model: Path, options: argparse.Namespace, experts: str, work: Path) -> list[float]:
    """Seconds of each step of transformers.Trainer."""
    net = MixtralForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation=experts)
    net.config.output_router_logits = True
    net.config.router_aux_loss_coef = 0.01
    encode = byte_tokenizer().encode
    parts = TrainRecipe(data=(DATA,)).parts
    rows = mixture_rows(parts, encode, eos_id=BYTE_EOS_ID, sequence_length=options.length, seed=0)
    examples = [
        {"input_ids": torch.from_numpy(row.token_L), "labels": torch.from_numpy(row.token_L)}
        for row in islice(rows, options.steps * options.batch)
    ]
    clock = Clock(options)
    with tempfile.TemporaryDirectory(dir=work) as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=1e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=net, args=arguments, train_dataset=examples, callbacks=[clock]).train()
    return clock.steps()


LOOPS = {"moectl train": ours, "transformers.Trainer": theirs}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    net = make_model(options)
    flops = flops_per_token(net, moe_blocks(net), 2, options.length)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    speed = matmul_speed(torch.device(options.device), getattr(torch, options.dtype), clock)
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        net.save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        for turn in range(options.rounds):
            cells = [(loop, experts) for loop in LOOPS for experts in (NAME, "grouped_mm")]
            for loop, experts in cells[turn % len(cells) :] + cells[: turn % len(cells)]:
                seconds = LOOPS[loop](model, options, experts, Path(directory))[SKIPPED:]
                rate = options.batch * options.length * len(seconds) / sum(seconds)
                found.setdefault((loop, experts), []).append(rate)
    rows = [
        {
            "loop": loop,
            "experts": experts,
            "tokens_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "mfu": statistics.median(rates) * flops / speed,
        }
        for (loop, experts), rates in sorted(found.items())
    ]
    for row in rows:
        print(
            f"{row['loop']:22} {row['experts']:12} {row['tokens_per_second']:10,.0f} tokens/s "
            f"({row['lowest']:,.0f} to {row['highest']:,.0f})  MFU {row['mfu']:.1%}"
        )
    if options.out:
        document = {
            "schema": "moectl.benchmark.train/1",
            "command": command(),
            "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
            "parameters": net.num_parameters(),
            "flops_per_token": flops,
            "matmul_flops_per_second": speed,
            "rounds": options.rounds,
            "steps": options.steps,
            "tokens_per_step": options.batch * options.length,
            "dtype": options.dtype,
            "device": options.device,
            "rows": rows,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
