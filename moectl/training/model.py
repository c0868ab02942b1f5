"""From a checkpoint to what is trained: the model in float32, its tokenizer, and the end-of-text token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from moectl.checkpoint.source import Checkpoint
from moectl.data.chat import EncodeChat, chat_encoder
from moectl.errors import InputError
from moectl.families.components import within
from moectl.integrations.complete import check_complete, make_known
from moectl.layerwise.pairs import first_id, sentinel_ids, spans_apart, started
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config, unusable
from moectl.layerwise.tokenizer import load_tokenizer
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
    """The language model with every weight of the checkpoint, on the CPU, in training mode.

    Args:
        implementation: of the experts; None for transformers' default.
        dtype: float32, or "auto" for what the checkpoint is stored in.
        distributed: a `DistributedConfig` of transformers, by which it is sharded and placed while it is loaded.

    Raises:
        InputError: transformers cannot load it, it is quantised, or keys are left over or missing.
    """
    check_trainable(source)
    auto = AutoModelForSeq2SeqLM if read_config(source).is_encoder_decoder else AutoModelForCausalLM
    try:
        with quiet():
            model, info = auto.from_pretrained(
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
        InputError: the checkpoint is quantised, or transformers does not know it.
    """
    if getattr(read_config(source), "quantization_config", None):
        raise InputError(
            f"{escape(source.name)} is quantised.",
            "Its weights have no gradients.",
            "Train the checkpoint it was made from.",
        )


def load_encoding(source: Checkpoint, *, chat: bool = False) -> Encoding:
    """The checkpoint's tokenizer, without special tokens of its own; with its chat template if `chat` is wanted.

    Raises:
        InputError: there is none, it names no end of text, it has more tokens than the model, or no usable template.
    """
    make_known(source)
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
    vocab_size = next((int(place["vocab_size"]) for place in within(source.config) if place.get("vocab_size")), 1 << 62)
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


@dataclass(frozen=True, slots=True)
class Spans:
    """How rows of text become the sources and targets of an encoder-decoder: T5's span corruption.

    Attributes:
        sentinels: the ids that stand for spans.
        first: what the decoder begins with.
    """

    sentinels: list[int]
    first: int

    def pairs(self, token_BL: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources [B, S] and what the decoder reads and predicts [B, 1 + T]; the spans follow from the seed."""
        source_BS, target_BT = spans_apart(token_BL, self.sentinels, seed)
        return source_BS, started(target_BT, self.first)


def load_spans(source: Checkpoint) -> Spans | None:
    """The spans of an encoder-decoder; None for a decoder.

    Raises:
        InputError: its tokenizer has no sentinels.
    """
    config = read_config(source)
    if not config.is_encoder_decoder:
        return None
    sentinels = sentinel_ids(load_tokenizer(source))
    if not sentinels:
        raise InputError(
            f"The tokenizer of {escape(source.name)} has no token <extra_id_0>.",
            "An encoder-decoder is trained to fill in spans of its text, and each is marked by such a token.",
            "Give a model with T5's tokenizer, or add <extra_id_0>, <extra_id_1> and so on to this one.",
        )
    return Spans(sentinels, first_id(config))
