"""From a checkpoint to what is trained: the model in float32, its tokenizer, and the end-of-text token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moectl.checkpoint.source import Checkpoint
from moectl.data.chat import EncodeChat, chat_encoder
from moectl.errors import InputError
from moectl.integrations.complete import check_complete
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config, unusable
from moectl.text import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Encoding:
    """How text and conversations become ids: the functions, and the id that ends a document."""

    encode: Callable[[str], list[int]]
    encode_chat: EncodeChat | None
    eos_id: int


def load_model(
    source: Checkpoint,
    implementation: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    distributed: Any = None,
) -> PreTrainedModel:
    """The causal language model with every weight of the checkpoint, on the CPU, in training mode.

    Args:
        implementation: of the experts; None for transformers' default.
        dtype: float32, or "auto" for what the checkpoint is stored in.
        distributed: a `DistributedConfig` of transformers, by which it is sharded and placed while it is loaded.

    Raises:
        InputError: transformers cannot load it, it is quantised, an encoder-decoder, or keys are left over or missing.
    """
    check_trainable(source)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=dtype,
                experts_implementation=implementation,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **({"distributed_config": distributed} if distributed else {}),
            )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise unusable(source, "cannot be loaded by transformers", error) from error
    check_complete(source, info)
    return model.train()


def check_trainable(source: Checkpoint) -> None:
    """Refuse what the loop cannot train.

    Raises:
        InputError: the checkpoint is quantised or an encoder-decoder, or transformers does not know it.
    """
    config = read_config(source)
    if getattr(config, "quantization_config", None):
        raise _untrainable(source, "is quantised", "Its weights have no gradients.")
    if config.is_encoder_decoder:
        raise _untrainable(source, "is an encoder-decoder", "The loop trains next-token prediction.")


def load_encoding(source: Checkpoint, *, chat: bool = False) -> Encoding:
    """The checkpoint's tokenizer, without special tokens of its own; with its chat template if `chat` is wanted.

    Raises:
        InputError: there is none, it names no end of text, it has more tokens than the model, or no usable template.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's parser raises, it is about the files it was given
        raise unusable(source, "has no tokenizer that transformers can load", error) from error
    eos = tokenizer.eos_token_id
    if eos is None:
        declared = read_config(source).get_text_config(decoder=True).eos_token_id
        eos = declared[0] if isinstance(declared, list) else declared
    if eos is None:
        raise InputError(
            f"{escape(source.name)} has no end-of-text token.",
            "Documents are packed one after the other, with that token between them.",
            "Name an eos_token in tokenizer_config.json.",
        )
    vocab_size = int(source.config.get("vocab_size") or 1 << 62)
    if max(len(tokenizer), eos + 1) > vocab_size:
        raise InputError(
            f"The tokenizer of {escape(source.name)} has {len(tokenizer)} tokens, the model {vocab_size}.",
            "Some of its ids have no embedding.",
            "Give the tokenizer the model was trained with.",
        )

    def encode(text: str) -> list[int]:
        with quiet():  # it warns that a document is longer than the model's context; documents are cut into rows
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return Encoding(encode, chat_encoder(tokenizer, source.name) if chat else None, int(eos))


def _untrainable(source: Checkpoint, what: str, why: str) -> InputError:
    return InputError(f"{escape(source.name)} {what}.", why, "Train the checkpoint it was made from.")
