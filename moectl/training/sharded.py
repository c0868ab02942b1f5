"""A model in pieces: built without its weights, sharded with FSDP2, and filled one decoder layer at a time.

No process holds the whole model: beside its own pieces it needs room to read and convert one layer. Measured for four
processes and a model of 841 MB in float32, layers of 70 MB, pieces of 210 MB: 490 MB at the peak, where loading all of
it first takes 1,692 MB (`benchmarks/load_memory.py`). Every process reads the whole checkpoint for itself, so that
nothing is sent between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.layerwise.loading import WeightLoader
from moectl.layerwise.model import units
from moectl.layerwise.skeleton import build, decoder_layers, read_config
from moectl.text import escape
from moectl.training.expert_parallel import distributed_config
from moectl.training.model import check_trainable, load_model
from moectl.training.parameters import selection_biases
from moectl.training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_placed(
    source: Checkpoint, world: World, implementation: str | None = None, expert_parallel: int = 1
) -> PreTrainedModel:
    """The model of a checkpoint as it is trained in this world: whole, in pieces, or with its experts spread.

    Args:
        implementation: of the experts; None for transformers' default.
        expert_parallel: over how many processes the experts of a layer are spread; 1 shards them like the rest.

    Raises:
        InputError: transformers cannot load it, it is quantised, or does not load completely, or it is an
            encoder-decoder and there are several processes.
        MachineError: the installed transformers cannot spread experts.
        UsageError: the processes do not divide into groups of that size.
        SaidElsewhere: another process raises one of these.
    """
    with world.agreed():
        check_trainable(source)
        if world.size > 1 and read_config(source).is_encoder_decoder:
            raise InputError(
                f"{escape(source.name)} is an encoder-decoder.",
                "It cannot be spread over processes: a model is sharded by the layers of its decoder.",
                "Train it in one process, without torchrun.",
            )
        if expert_parallel == 1 and world.size > 1:
            return load_sharded(source, world, implementation)
        if expert_parallel == 1:
            return load_model(source, implementation).to(world.device)
        spread = distributed_config(world, expert_parallel)
    return load_model(source, implementation, distributed=spread)  # while it does, the processes speak to each other


def load_sharded(source: Checkpoint, world: World, implementation: str | None = None) -> PreTrainedModel:
    """The causal language model in float32 and in training mode, its parameters spread over all processes.

    Its values are those that `load_model` gives, bit for bit.

    Args:
        implementation: of the experts; None for transformers' default.

    Raises:
        InputError: transformers cannot build it, it is quantised, an encoder-decoder, or a tensor is missing,
            unexpected or misshapen.
    """
    check_trainable(source)
    whole = build(source, torch.float32, "cpu")
    loader = WeightLoader(whole, source, torch.float32, "cpu")
    model = build(source, torch.float32, world.device, implementation)
    _untie(model, whole, loader)
    computed = list(model.named_non_persistent_buffers())
    prefix, layers = decoder_layers(source, model)
    world.shard(model, layers, selection_biases(model))
    model.to_empty(device=world.device)
    for name, buffer in computed:  # rotary frequencies and the like, which no checkpoint holds
        model.get_buffer(name).copy_(buffer)

    places = model.state_dict()
    with torch.no_grad():
        for names in units(loader.names, prefix).values():
            with loader.loaded(names):
                for name in names:
                    _fill(places[name], whole.get_parameter_or_buffer(name))
    source.check_unchanged()
    return model.train()


def _untie(model: PreTrainedModel, whole: PreTrainedModel, loader: WeightLoader) -> None:
    """Part what the config ties where the checkpoint has two different tensors, as `from_pretrained` does."""
    for name, origin in list(model.all_tied_weights_keys.items()):
        with loader.loaded([name, origin]):
            one, other = (whole.get_parameter(each).view(torch.int32) for each in (name, origin))  # NaN equals NaN
            if not torch.equal(one, other):
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(model.get_parameter(name))))
                del model.all_tied_weights_keys[name]


def _fill(place: Tensor, value: Tensor) -> None:
    """Copy into a parameter what it holds of a whole tensor: all of it, or this process's rows."""
    if not isinstance(place, DTensor):
        place.copy_(value)
        return
    pieces = value.chunk(place.device_mesh.size())
    rank = place.device_mesh.get_local_rank()
    if rank < len(pieces):  # the last processes have nothing of a tensor with few rows
        place.to_local().copy_(pieces[rank])
