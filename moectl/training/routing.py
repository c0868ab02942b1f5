"""Training with a router of `moectl.routers`: making the model that has it, watching it, and saving what comes out.

The model is made as a research checkpoint beside the training's own checkpoints, and trained from there like any other.
A router sees the tokens of one micro-batch of one process; what it counts for its next step is counted over all, and
MiniMax-01's shares its room with the other processes (`moectl.routers.processes`).

Shapes: T tokens, D hidden, E experts, K choices; L layers with routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError
from moectl.integrations.routed.held import Held, HeldRouter
from moectl.integrations.routed.install import held
from moectl.layerwise.routed import plan_of, routed_plan
from moectl.layerwise.skeleton import build
from moectl.training.adapters import Adapter, Source
from moectl.training.recipe import TrainRecipe
from moectl.training.routers import BIASES, MoeBlock, RouterWatch, moe_blocks
from moectl.training.world import World

PROBES = 256
"""Tokens, at least, by which a family's router is compared with ours."""


def routed_source(source: Source, recipe: TrainRecipe, root: Path, world: World) -> Source:
    """The source with the recipe's router, if it has one, in the partial output; the first process writes it, once.

    Raises:
        InputError: the source has no MoE layers, or their routers cannot be replaced.
        UsageError: there is no such router, or it is not for this model.
    """
    if recipe.router is None or isinstance(source, Adapter):
        return source
    target = root / "routed"
    with world.agreed():
        if world.is_main and not target.exists():
            write(routed_plan(plan_of(source), recipe.router, recipe.seed), target)
    return Checkpoint.open(target)


def as_held(source: Source, begun: Source, tensors: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """What to save a training that began with `begun` as, and its tensors by that one's names.

    It is the source, an ordinary checkpoint, where its own routers do what the trained ones do, and else the research
    checkpoint.
    """
    if begun is source or isinstance(source, Adapter) or isinstance(begun, Adapter):
        return begun, tensors
    native = native_tensors(source, begun, tensors)
    return (begun, tensors) if native is None else (source, native)


@dataclass(frozen=True)
class RoutedBlock(MoeBlock):
    """A layer with one of our routers."""

    router: Held

    @property
    def num_experts(self) -> int:
        """How many there are to choose from."""
        return self.router.num_experts

    def share(self, top_k: int, sequence_length: int) -> float:
        """As its router says."""
        return self.router.share(sequence_length)


def routed_blocks(model: nn.Module) -> list[MoeBlock]:
    """The layers with routers of ours, in their order, after those whose own router stayed; none if all stayed."""
    ours: list[MoeBlock] = []
    for name, module in held(model).items():
        path = name.rpartition(".")[0] if isinstance(module, HeldRouter) else name
        experts = getattr(model.get_submodule(path), "experts", module)
        ours.append(RoutedBlock(path, module, 0, experts, None))
    return [*moe_blocks(model), *ours] if ours else []


class RoutedWatch:
    """What `RouterWatch` is to a family's routers: ours leave their load and their losses behind.

    Attributes:
        blocks: the layers that are watched.
        loss: what the routers of the last pass ask for, coefficients applied.
        consistency: what the disagreement of two passes is multiplied with (THOR); 0: there is one pass.
    """

    def __init__(self, blocks: list[MoeBlock]) -> None:
        self.blocks = blocks
        self.routers = [block.router for block in blocks if isinstance(block.router, Held)]
        self.loss = torch.zeros(())
        self.consistency = max(getattr(router.router.options, "consistency", 0.0) for router in self.routers)
        others = blocks[: len(blocks) - len(self.routers)]
        self._others = RouterWatch(others) if others else None

    def at(self, progress: float) -> None:
        """Tell the routers which share of the training is done."""
        for router in self.routers:
            router.passing.progress = progress

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Router logits of the family's own routers, and the assignments counted in all layers `[L, E]`, int64."""
        seen = [found for router in self.routers if (found := router.take()) is not None]
        if len(seen) < len(self.routers):
            raise InputError("A layer with a router was not run.", "", "Train a model of another family.")
        self.loss = torch.stack([each.aux_loss for each in seen]).sum()
        logits, others = self._others.take() if self._others else ([], ())
        loads = [*others, *(each.load_E for each in seen)]
        width = max(len(load_E) for load_E in loads)
        return logits, torch.stack([nn.functional.pad(load_E, (0, width - len(load_E))) for load_E in loads])

    def after_step(self, load_LE: Tensor) -> None:
        """Move what the routers move without a gradient, by the load of the whole step."""
        for router, load_E in zip(self.routers, load_LE[-len(self.routers) :], strict=True):
            router.router.after_step(load_E[: router.num_experts])


def native_tensors(source: Checkpoint, routed: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The trained tensors under the names of the family's own class, if that routes in use exactly as ours does.

    Every layer's router of the family is run beside ours with the trained weights, on random hidden states and on a
    batch of one repeated token, which overflows any capacity: the choices have to be the same and the weights agree to
    1e-6. What the family has no place for is drawn at random for it, so that it is lost only where nothing depends on
    it. None if any differ.

    Args:
        source: what the training began with.
        routed: the research checkpoint that was trained.
        tensors: what came out, by the names in memory.
    """
    family, ours = (build(each, torch.float32, "cpu", two_stacks=True) for each in (source, routed))
    renamed: dict[str, str] = {}
    for name, module in held(ours).items():
        if not isinstance(module, HeldRouter):
            return None
        own = family.get_submodule(name)
        names = _counterparts(name, own, tensors)
        if names is None or not _same(own, module, name, names, tensors):
            return None
        renamed |= names
    wanted = {name: tensors.get(renamed.get(name, name)) for name in family.state_dict()}
    return None if any(value is None for value in wanted.values()) else wanted  # type: ignore[return-value]


def _counterparts(name: str, own: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """What a family's router calls its parameters and buffers, and what ours calls them; None if we lack one."""
    found = {}
    for leaf, value in own.state_dict().items():
        ours = f"{name}.router.{'bias' if leaf in (*BIASES, 'bias') else 'weight'}"
        if ours not in tensors or tensors[ours].shape != value.shape:
            return None
        found[f"{name}.{leaf}"] = ours
    return found


@torch.no_grad()
def _same(
    own: nn.Module, module: HeldRouter, name: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a family's router and ours send every token to the same experts with the same weights."""
    own, module = own.to_empty(device="cpu").eval(), module.to_empty(device="cpu").eval()
    own.load_state_dict({key.removeprefix(f"{name}."): tensors[ours] for key, ours in names.items()})
    prefix = f"{name}."
    module.load_state_dict(
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    )
    hidden_size = next(value.shape[-1] for value in own.parameters() if value.ndim == 2)
    draw = torch.Generator().manual_seed(0)
    for leaf, value in module.state_dict().items():
        if prefix + leaf not in names.values() and value.is_floating_point():
            value.normal_(generator=draw)
    probes = 1 + max(PROBES, getattr(own, "expert_capacity", 0))  # a room that does not grow with the batch is filled
    random_BTD = torch.randn(1, probes, hidden_size, generator=draw)
    module.passing.token_BL = torch.zeros(1, probes, dtype=torch.int64)
    for given_BTD in (random_BTD, random_BTD[:, :1].expand(-1, probes, -1).contiguous()):
        given = given_BTD if module.form == "mask" else given_BTD[0]
        one_TE, two_TE = (_weights(each(given), module) for each in (own, module))
        if not torch.equal(one_TE != 0, two_TE != 0) or not torch.allclose(one_TE, two_TE, rtol=1e-6, atol=1e-6):
            return False
    return True


def _weights(output: Any, module: HeldRouter) -> Tensor:
    """What each expert's output is multiplied with `[T, E]`, from what a router returns."""
    one, two, three = output
    if module.form == "mask":
        return (one * two).flatten(0, -2)
    return torch.zeros(len(three), module.num_experts).scatter_add(1, three, two.float())
