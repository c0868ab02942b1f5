"""What a checkpoint loses without some of its experts: it reads the same text again under each mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import read_documents
from moectl.errors import UsageError
from moectl.integrations.implementation import set_experts
from moectl.layerwise.quiet import quiet
from moectl.layerwise.scoring import log_probabilities
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import encoder, load_tokenizer, prefix
from moectl.layerwise.whole import device_named, dtype_named, load
from moectl.routing.batches import read_texts
from moectl.routing.masking import Mask
from moectl.routing.masks import Held, Rerun, held, reruns
from moectl.routing.points import find
from moectl.routing.run import Settings
from moectl.text import escape
from moectl.traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class Losses:
    """Nats per token, of `tokens` tokens, without a mask, and what each adds; `held` is what the trace alone says."""

    tokens: int
    loss: float
    masks: tuple[Rerun, ...]
    held: tuple[Held, ...]


def masked_losses(
    checkpoint: Checkpoint,
    data: Sequence[str],
    masks: Sequence[Mask],
    settings: Settings,
    trace: RoutingTrace,
    say: Callable[[str], None] = lambda _text: None,
) -> Losses:
    """The loss on the text of a routing run, which left `trace`, once without and once with each mask.

    Raises:
        UsageError: a mask leaves too few experts, or the model is to be run layer by layer or is an encoder-decoder.
        InputError: the checkpoint or the data cannot be used, or its experts cannot be masked.
    """
    if settings.layerwise or read_config(checkpoint).is_encoder_decoder:
        raise UsageError(
            f"{escape(checkpoint.name)} cannot be run again with a mask.",
            "Masks are for decoder-only models that are in memory whole.",
            "Leave --mask out, or --layerwise.",
        )
    tokenizer = load_tokenizer(checkpoint)
    texts = read_texts(read_documents(data, settings.split), encoder(tokenizer), settings.max_tokens, None)
    documents = [ids.tolist() for ids in texts.ids_N]
    tokens = sum(map(len, documents))
    say(f"Reading {tokens:,} tokens {1 + len(masks)} times: without a mask, and with each")
    device = device_named(settings.device)
    with quiet(), torch.no_grad():
        model = load(checkpoint, dtype_named(settings.dtype, device))
        if settings.experts_implementation is not None:
            set_experts(model, settings.experts_implementation, checkpoint.name)
        model.to(device).eval()
        start = prefix(checkpoint, tokenizer)
        loss, found = reruns(
            find(model),
            masks,
            lambda: log_probabilities(model, documents, start, trace.about["sequence_length"]),
            settings.seed,
        )
    return Losses(tokens, loss, tuple(found), tuple(held(trace)))
