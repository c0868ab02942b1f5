"""Tiny Mixture-of-Experts checkpoints to prune, and transformers' own model with experts that cannot be chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moectl.checkpoint.plan import Plan
from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet

EXPERTS = 8


def made(path: Path, model_type: str, **sizes: Any) -> Checkpoint:
    """A tiny random model of a family on disk."""
    with quiet():
        tiny_moe(model_type, **sizes).save_pretrained(path)
    return Checkpoint.open(path)


def written(plan: Plan, path: Path) -> Checkpoint:
    write(plan, path)
    return Checkpoint.open(path)


def loaded(checkpoint: Checkpoint, **options: Any) -> Any:
    """The model as transformers loads it, all of whose keys have found their places."""
    with quiet():
        auto = AutoModelForSeq2SeqLM if checkpoint.config.get("is_encoder_decoder") else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            checkpoint.path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
    return model.eval()


class _Products(TorchFunctionMode):
    """Inside, the router's scores of some experts are minus infinity wherever a product makes them."""

    def __init__(self, gone: Sequence[int]) -> None:
        super().__init__()
        self.gone, self.seen = list(gone), 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__") and result.shape[-1] == EXPERTS:
            self.seen += 1
            result = result.index_fill(-1, torch.tensor(self.gone), -torch.inf)
        return result


@contextmanager
def masked(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """The model with all experts but some of each layer out of its routers' reach: -inf before softmax and top-k."""
    restore: list[Any] = []
    modes = []
    for layer, experts in kept.items():
        gone = sorted(set(range(EXPERTS)) - set(experts))
        inside = f"layers.{layer}."
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if inside in name and name.endswith(("e_score_correction_bias", "expert_bias")):
                restore.append((tensor, tensor.clone()))
                tensor.data[..., gone] = -torch.inf
        for name, module in model.named_modules():
            if inside in name + "." and name.rpartition(".")[2] in ("gate", "router"):
                modes.append(mode := _Products(gone))
                forward = module.forward

                def within(*given: Any, forward: Any = forward, mode: Any = mode, **named: Any) -> Any:
                    with mode:
                        return forward(*given, **named)

                module.forward = within
                restore.append((module, None))
    yield
    assert all(mode.seen for mode in modes if mode.gone) and len(modes) >= len(kept)
    for thing, value in restore:
        if value is None:
            del thing.forward
        else:
            thing.data.copy_(value)


def logits(model: Any, seed: int = 0) -> Tensor:
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
