"""Watching the routers of a transformers model: the logits and the choices of every MoE layer, as it runs.

transformers itself records routers by their class (`_can_record_outputs`), and this uses that table; what was chosen
is what the experts beside the router are given. Shapes: T tokens, E experts, K choices; L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.integrations.recorded import recorded_routers
from moectl.integrations.routed.held import Held
from moectl.text import escape

BIASES = ("e_score_correction_bias", "expert_bias")
"""What families call the biases that take part in choosing experts and in nothing else."""


@dataclass(frozen=True)
class MoeBlock:
    """One MoE layer's modules: its name, what computes its router logits, its experts, its selection bias if any."""

    name: str
    router: nn.Module
    output: int
    experts: nn.Module
    bias: Tensor | None

    @property
    def num_experts(self) -> int:
        """How many routed experts there are: a row of the router each, wherever they are."""
        return next(len(weight) for weight in self.router.parameters() if weight.ndim == 2)

    def share(self, top_k: int, sequence_length: int) -> float:
        """Of the experts' work if every expert took every token, what they do."""
        return top_k / self.num_experts


def moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """The MoE layers of a model in their order, but for those with a router of ours; none in a dense model.

    Raises:
        InputError: transformers records this model's routers, but their experts are not beside them.
    """
    blocks = []
    for name, module, output in recorded_routers(model):
        if isinstance(module, Held):
            continue
        path = name.rpartition(".")[0]
        block = model.get_submodule(path)
        experts = getattr(block, "experts", None)
        rows = [weight for weight in module.parameters() if weight.ndim == 2]
        if not isinstance(experts, nn.Module) or not rows:
            raise InputError(
                f"The experts of {escape(path)} ({type(block).__name__}) are not beside its router.",
                "What each of them receives cannot be counted, so it could not be balanced.",
                "Train a model of another family: `moectl families --backend` lists those that can.",
            )
        named = [*block.named_buffers(), *block.named_parameters()]
        bias = next((tensor for key, tensor in named if key.rpartition(".")[2] in BIASES), None)
        blocks.append(MoeBlock(path, module, output, experts, bias))
    return blocks


def top_k_of(model: Any) -> int:
    """How many experts a token is sent to, by the model's config; 1 if it does not say."""
    config = model.config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "top_k"):
        value = getattr(config, name, None)
        if value:
            return int(max(value) if isinstance(value, list) else value)
    return 1


class RouterWatch:
    """Hooks on every MoE layer; after a forward pass `take` hands over what was seen.

    Attributes:
        blocks: the layers that are watched.
    """

    def __init__(self, blocks: list[MoeBlock]) -> None:
        self.blocks = blocks
        self._logits: dict[int, Tensor] = {}
        self._load: dict[int, Tensor] = {}
        for layer, block in enumerate(blocks):
            block.router.register_forward_hook(self._on_router(layer, block))
            block.experts.register_forward_pre_hook(self._on_experts(layer, block), with_kwargs=True)

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Router logits `[T, E]` of each layer, with their graph, and the assignments counted `[L, E]`, int64.

        Raises:
            InputError: a layer was not run, or its experts were called in an unknown way.
        """
        missing = [block.name for at, block in enumerate(self.blocks) if at not in self._logits or at not in self._load]
        if missing:
            raise InputError(
                f"The router of {escape(missing[0])} could not be watched.",
                "Its logits or the experts it chose did not pass through its modules.",
                "Train a model of another family: `moectl families --backend` lists those that can.",
            )
        layers = range(len(self.blocks))
        logits = [self._logits[layer] for layer in layers]
        width = max(len(load_E) for load_E in self._load.values())
        load_LE = torch.stack([nn.functional.pad(self._load[at], (0, width - len(self._load[at]))) for at in layers])
        self._logits, self._load = {}, {}
        return logits, load_LE

    def _on_router(self, layer: int, block: MoeBlock) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            logits = output[block.output] if isinstance(output, tuple) else output
            self._logits[layer] = logits.flatten(0, -2)

        return hook

    def _on_experts(self, layer: int, block: MoeBlock) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
            chosen = next((value for value in given if not value.is_floating_point()), None)
            if chosen is not None:
                is_mask = chosen.ndim == 3  # Switch's experts are given a mask [T, 1, E]
                load_E = (
                    chosen.sum((0, 1)) if is_mask else torch.bincount(chosen.flatten(), minlength=block.num_experts)
                )
                self._load[layer] = load_E

        return hook
