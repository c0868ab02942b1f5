"""Training an adapter: a PEFT directory (PESC or LoRA) on its frozen base model, written back as such a directory.

Beside several processes' pieces of the base model, every process holds the adapter whole: it is small.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.location import resolve
from moectl.checkpoint.source import INDEX, SINGLE, Checkpoint, read_json
from moectl.errors import InputError
from moectl.layerwise.quiet import quiet
from moectl.text import escape, reason, shown
from moectl.training.world import World

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("PESC", "LORA")
_TYPES = {stored: name for name, stored in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter and the model it is for.

    Attributes:
        base: the frozen model.
        weights: the adapter's tensors; its config is adapter_config.json.
    """

    base: Checkpoint
    weights: Checkpoint

    @property
    def name(self) -> str:
        """What to call it: the Hub id or the directory's own name."""
        return self.weights.name


Source = Checkpoint | Adapter
"""What can be trained."""


def open_source(model: str, revision: str | None = None) -> Source:
    """The checkpoint, or the adapter with its base model, in a directory or Hub repository.

    Raises:
        InputError: it cannot be used, its base model is not named, or it is of another kind than `KINDS`.
        MachineError: the Hub cannot be reached.
        UsageError: a revision where there is none to choose.
    """
    found = resolve(model, revision)
    if not (found.path / CONFIG).exists() or any((found.path / name).exists() for name in (INDEX, SINGLE)):
        return Checkpoint.open(model, revision)
    config = read_json(found.path / CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind not in KINDS:
        raise _unusable(found.name, f"has peft_type {shown(kind)!r}", f"Give one of {' or '.join(KINDS)}.")
    if not isinstance(base, str) or not base:
        raise _unusable(found.name, "names no base model", f"Name it in {CONFIG}: base_model_name_or_path.")
    if not (found.path / WEIGHTS).exists():
        raise _unusable(found.name, f"has no {WEIGHTS}", "Save it as safetensors; pickles are not opened.")
    weights = replace(Checkpoint.of_file(found.path / WEIGHTS), name=found.name, config=config)
    pinned = None if Path(base).expanduser().exists() else config.get("revision")
    return Adapter(Checkpoint.open(base, pinned), weights)


def sources_of(source: Source) -> tuple[Checkpoint, ...]:
    """What is read: the model, and the adapter if there is one."""
    return (source.base, source.weights) if isinstance(source, Adapter) else (source,)


def attach(adapter: Adapter, model: nn.Module) -> nn.Module:
    """The base model with the adapter on it as PEFT puts it there, only the adapter learning, in training mode.

    On the meta device it has no weights.

    Raises:
        InputError: PEFT refuses it, or its tensors are not those its config asks for.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    import moectl.integrations.pesc  # noqa: F401 (PEFT knows its methods by registration)

    path = adapter.weights.path
    try:
        with quiet():
            config = PeftConfig.from_pretrained(path)
            config.inference_mode = False
            wrapped: nn.Module = get_peft_model(model, config)
        asked = {name: tuple(tensor.shape) for name, tensor in saved(wrapped).items()}
        held = {name: ref.shape for name, ref in adapter.weights.tensors.items()}
        wrong = sorted(name for name in asked | held if asked.get(name) != held.get(name))
        if wrong:
            raise ValueError(f"{wrong[0]} has {held.get(wrong[0])}, expected {asked.get(wrong[0])} by its config")
        if not any(tensor.is_meta for tensor in model.parameters()):
            set_peft_model_state_dict(wrapped, load_file(path / WEIGHTS))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise _unusable(adapter.name, f"does not fit {adapter.base.name}: {reason(error).rstrip('.')}") from error
    return wrapped.train()


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved(model: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors by the names that PEFT saves them under."""
    from peft import get_peft_model_state_dict

    held: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return held


def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Make the gradients of parameters that every process holds whole the mean over the processes, as FSDP's are."""
    for parameter in parameters if world.size > 1 else ():
        if parameter.grad is not None:
            parameter.grad = world.sum(parameter.grad) / world.size


def write_adapter(adapter: Adapter, tensors: Mapping[str, Tensor], target: Path) -> Checkpoint:
    """Write the directory, in the types and with the config and side files it came with; returns its weights."""
    target.mkdir(parents=True)
    types = {name: getattr(torch, _TYPES[ref.dtype]) for name, ref in adapter.weights.tensors.items()}
    rounded = {name: tensors[name].detach().cpu().to(dtype).contiguous() for name, dtype in types.items()}
    save_file(rounded, target / WEIGHTS, metadata={"format": "pt"})
    for side in (adapter.weights.path / CONFIG, *adapter.weights.side_files()):
        shutil.copyfile(side, target / side.name)
    return Checkpoint.of_file(target / WEIGHTS)


def _unusable(name: str, what: str, fix: str = "Check that it belongs to this model, or save it again.") -> InputError:
    return InputError(f"The adapter {escape(name)} {what}.", "It cannot be trained as it was meant.", fix)
