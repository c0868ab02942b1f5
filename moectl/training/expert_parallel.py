"""Expert parallelism: whole experts on different processes, tokens sent to them. The one seam to transformers' own.

transformers calls its `DistributedConfig` experimental, and earlier releases have another of the same name.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from moectl.errors import MachineError, UsageError
from moectl.training.world import World


def distributed_config(world: World, size: int) -> Any:
    """What `from_pretrained` shards a model by: FSDP2 over all processes, and experts over groups of `size` of them.

    Raises:
        MachineError: the installed transformers cannot.
        UsageError: the processes do not divide into such groups.
    """
    if size < 2 or world.size % size:
        raise UsageError(
            f"--expert-parallel {size} does not fit {world.size} process(es).",
            "Each group of that many processes holds all experts once.",
            "Give a divisor of the number of processes that torchrun starts, at least 2.",
        )
    config = getattr(getattr(transformers, "distributed", None), "DistributedConfig", None)
    if config is None or not {"fsdp_size", "ep_size"} <= set(inspect.signature(config).parameters):
        raise MachineError(
            f"transformers {transformers.__version__} has no expert parallelism that trains.",
            "Its DistributedConfig has no fsdp_size and ep_size.",
            "Install transformers 5.23 or later, or leave --expert-parallel out: FSDP2 shards the experts too.",
        )
    return config(fsdp_size=world.size, ep_size=size)
