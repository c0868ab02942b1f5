"""A model without weights: its configuration, its modules on the meta device, its decoder layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.integrations.complete import is_coded, make_known
from moectl.layerwise.quiet import quiet
from moectl.text import escape, reason


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers configuration of a checkpoint, with the defaults of its family filled in.

    Raises:
        InputError: transformers does not know the architecture or refuses its values.
    """
    make_known(checkpoint)
    try:
        with quiet():
            return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its parser raises, it is about the file it was given
        raise unusable(checkpoint, "has a config.json that transformers cannot use", error) from error


def build(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    implementation: str | None = None,
    *,
    two_stacks: bool = False,
) -> PreTrainedModel:
    """The checkpoint's language model: parameters on the meta device, unsaved buffers on `device`.

    Attention and experts run the way they do under `from_pretrained`: with its defaults, or with the experts
    `implementation` that is named.

    Args:
        two_stacks: an encoder-decoder will do too.

    Raises:
        InputError: it is quantised, an encoder-decoder, or no language model of transformers.
    """
    config = read_config(checkpoint)
    if is_coded(checkpoint):
        fix = "Make an ordinary checkpoint of it with `moectl decompress`, or give the one it was made from."
        raise _unsupported(checkpoint, "has coded experts", fix)
    if getattr(config, "quantization_config", None):
        raise _unsupported(checkpoint, "is quantised", "Give the checkpoint it was made from.")
    if config.is_encoder_decoder and not two_stacks:
        raise _unsupported(checkpoint, "is an encoder-decoder", "Give a decoder-only language model.")
    try:
        with quiet(), torch.device("meta"):
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_config(
                config, dtype=dtype, experts_implementation=implementation, trust_remote_code=False
            )
    except Exception as error:  # the sizes in a config.json can break a constructor in any way
        raise unusable(checkpoint, "is no causal language model transformers can build", error) from error
    _compute_buffers(model, device)
    return model.eval()


def decoder_layers(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of the decoder's list of layers, and the list: the largest that is as long as the config says.

    Raises:
        InputError: the decoder has no such list.
    """
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    counts = {count, getattr(config, "num_layers", count)}  # LongCat also counts the two halves of each layer
    decoder = model.get_decoder()
    inside = set(decoder.modules())
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts and module in inside
    ]
    if not candidates:
        what = f"has no list of {count} decoder layers in its {type(decoder).__name__}"
        raise _unsupported(checkpoint, what, "Use it where it fits in memory whole.")
    return max(candidates, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def all_layers(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, nn.Module], int]:
    """Every layer by name, in order, an encoder's before its decoder's, and how many are an encoder's.

    Raises:
        InputError: there is no list of layers.
    """
    if not model.config.is_encoder_decoder:
        prefix, layers = decoder_layers(checkpoint, model)
        return {f"{prefix}.{index}": layer for index, layer in enumerate(layers)}, 0
    encoder, decoder = (_largest_list(model, stack) for stack in (model.get_encoder(), model.get_decoder()))
    return encoder | decoder, len(encoder)


def _largest_list(model: PreTrainedModel, stack: nn.Module) -> dict[str, nn.Module]:
    """The layers of the list in a stack that holds most of its parameters."""
    inside = set(stack.modules())
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and each in inside]
    prefix, layers = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return {f"{prefix}.{index}": layer for index, layer in enumerate(layers)}


def unusable(checkpoint: Checkpoint, what: str, error: Exception) -> InputError:
    """The error for a checkpoint that transformers rejects, with the first line of its reason."""
    return InputError(
        f"{escape(checkpoint.name)} {what}: {reason(error)}",
        "Code that comes with a checkpoint is never run, so transformers itself has to know the model.",
        "Check its config.json, or install a transformers release that has this architecture.",
    )


def _compute_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Give unsaved buffers (rotary frequencies, embedding scales) the values `from_pretrained` gives them.

    They come from the model's own initialisation, on the CPU wherever they are used later; on meta parameters
    it does nothing.
    """
    with quiet():
        buffers = list(model.named_non_persistent_buffers())
        for name, buffer in buffers:
            _set_buffer(model, name, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()
        for name, _ in buffers:
            _set_buffer(model, name, model.get_buffer(name).to(device))


def _set_buffer(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _unsupported(checkpoint: Checkpoint, what: str, fix: str) -> InputError:
    why = "It cannot be run one decoder layer at a time."
    return InputError(f"{escape(checkpoint.name)} {what}.", why, fix)
