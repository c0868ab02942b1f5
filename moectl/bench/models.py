"""How fast whole models answer: prefill, time to first token, decode, generate and memory, for checkpoints or backends.

The experts backends of one model take turns on the same loaded weights, A B C, C B A; models come one after the other.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moectl.bench import device as machine
from moectl.bench.rows import explain
from moectl.bench.sweep import threads
from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.integrations.complete import from_pretrained, is_coded
from moectl.integrations.implementation import set_ours
from moectl.layerwise.memory import resident
from moectl.layerwise.quiet import quiet
from moectl.text import shown

AS_LOADED = "as loaded"


@dataclass(frozen=True)
class Settings:
    """What to measure; the options of `moectl bench model`."""

    models: list[str]
    backends: list[str]
    prompt: int = 128
    new_tokens: int = 32
    batch: int = 1
    rounds: int = 5
    dtype: str = "bfloat16"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    revision: str | None = None


def measure(settings: Settings, on_cell: Callable[[str], None] = lambda _title: None) -> dict[str, Any]:
    """One row per model and backend; a backend that cannot run a model is a row with a reason.

    Raises:
        InputError: a checkpoint cannot be used.
        MachineError: no such device, or the Hub cannot be reached.
    """
    device = machine.pick(settings.device)
    checkpoints = [Checkpoint.open(model, settings.revision) for model in settings.models]
    rows = []
    with threads(settings.threads):
        for checkpoint in checkpoints:
            on_cell(checkpoint.name)
            rows += _measure_model(checkpoint, settings, device)
        about = machine.describe(device)
    first = next((row["decode_tokens_per_s"] for row in rows if row["decode_tokens_per_s"]), None)
    for row in rows:
        speed = row["decode_tokens_per_s"]
        row["speedup"] = speed / first if speed and first else None
    keep = ("prompt", "new_tokens", "batch", "rounds", "seed")
    return {
        "kind": "model",
        "device": about,
        "settings": {name: getattr(settings, name) for name in keep},
        "rows": rows,
    }


def _measure_model(checkpoint: Checkpoint, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    memory = _Memory(device)
    model = _load(checkpoint, settings.dtype, device)
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [
        torch.randint(vocabulary, (settings.batch, settings.prompt), generator=generator).to(device)
        for _ in range(settings.rounds)
    ]
    size = {"parameters": _parameters(model), "weight_bytes": _weight_bytes(model)}
    seen: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    # A model without experts has no backends to choose from; transformers' own test is asked.
    has_experts = getattr(model, "_can_set_experts_implementation", lambda: True)()
    backends = settings.backends if has_experts else [AS_LOADED]
    for name in backends:
        try:
            _use(model, name)
            memory.reset()
            _once(model, prompts[0], settings.new_tokens, device)
            peaks[name] = memory.peak()
            seen[name] = defaultdict(list)
        except Exception as error:
            reasons[name] = explain(error)
    for turn, prompt in enumerate(prompts):
        for name in list(seen) if turn % 2 == 0 else list(seen)[::-1]:
            _use(model, name)
            for key, times in _once(model, prompt, settings.new_tokens, device).items():
                seen[name][key] += times
    del model
    gc.collect()
    start = {"model": checkpoint.name, "dtype": settings.dtype, **size}
    return [
        {**start, "backend": name, **_row(seen.get(name), settings), "peak_bytes": peaks.get(name)}
        | {"reason": reasons.get(name)}
        for name in backends
    ]


def _parameters(model: Any) -> int:
    """As its config has them: a coded model has the same, in fewer bytes."""
    config = deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"), quiet():
        return sum(parameter.numel() for parameter in type(model)(config).parameters())


def _weight_bytes(model: Any) -> int:
    """What parameters and buffers take, each once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def _row(times: dict[str, list[float]] | None, settings: Settings) -> dict[str, Any]:
    """Medians; decode times are per token of every sequence of the batch."""
    keys = ("prefill_tokens_per_s", "ttft_ms", "decode_tokens_per_s", "generate_tokens_per_s")
    if not times:
        return {**dict.fromkeys((*keys, "p50_ms", "p20_ms", "p80_ms")), "reps": 0}
    p20, p50, p80 = (1000 * float(p) for p in np.percentile(times["decode"], [20, 50, 80]))
    tokens = settings.batch * settings.new_tokens
    return {
        "prefill_tokens_per_s": settings.batch * settings.prompt / float(np.median(times["prefill"])),
        "ttft_ms": 1000 * float(np.median(times["first"])),
        "decode_tokens_per_s": 1000 * settings.batch / p50,
        "generate_tokens_per_s": tokens / float(np.median(times["generate"])),
        "p50_ms": p50,
        "p20_ms": p20,
        "p80_ms": p80,
        "reps": len(times["decode"]),
    }


@torch.no_grad()
def _once(model: Any, prompt: torch.Tensor, new_tokens: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a prefill, of the tokens after it one by one, of `generate` to its first token and to its last."""
    out, prefill = _timed(device, lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))
    steps = []
    for _ in range(new_tokens - 1):
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        step = partial(model, input_ids=token, past_key_values=cache, use_cache=True)
        out, seconds = _timed(device, step)
        steps.append(seconds)
    mask = torch.ones_like(prompt)

    def generate(count: int) -> Any:
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    with quiet():
        first = _timed(device, lambda: generate(1))[1]
        whole = _timed(device, lambda: generate(new_tokens))[1]
    return {"prefill": [prefill], "decode": steps, "first": [first], "generate": [whole]}


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - started


def _use(model: Any, backend: str) -> None:
    """Switch the experts of a loaded model."""
    if backend == AS_LOADED:
        return
    if backend == "moectl":
        import_module("moectl.integrations.transformers")
    with quiet():
        model.set_experts_implementation(backend)


def _load(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model: Any = from_pretrained(AutoModelForCausalLM, checkpoint, dtype=machine.DTYPES[dtype])
    except InputError:  # a ValueError too
        raise
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{shown(checkpoint.name)} does not load as a causal language model.",
            explain(error),
            "Only models that generate text from left to right are measured.",
        ) from error
    if is_coded(checkpoint):  # as `moectl.integrations.transformers.load` has it
        set_ours(model)
    return model.to(device).eval()


class _Memory:
    """Peak bytes while a model runs: of the CUDA allocator, or on Linux of the process, above those before loading."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if self._cuda else resident("VmRSS")

    def reset(self) -> None:
        """Count from here; loading has ended, and its own peak does not count."""
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # then VmHWM would be that of loading
            self._before = None

    def peak(self) -> int | None:
        """The most that was in use since `reset`, None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - (self._before or 0)
        high = resident("VmHWM")
        return None if high is None or self._before is None else max(0, high - self._before)
