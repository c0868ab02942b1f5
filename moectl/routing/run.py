"""A routing run: a checkpoint reads documents, and who went where is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import Split, read_documents
from moectl.errors import InputError, UsageError
from moectl.integrations.implementation import set_experts
from moectl.launched import rank_and_size
from moectl.layerwise.model import LayerwiseModel
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import encoder, load_tokenizer, prefix
from moectl.layerwise.whole import check_ids, device_named, dtype_named, load
from moectl.routing import passes
from moectl.routing.batches import Texts, batches, read_texts
from moectl.routing.capture import Capture
from moectl.routing.check import Checked, check, complete
from moectl.routing.parallel import gathered, own_device
from moectl.routing.recorder import Recorder, sampled_documents
from moectl.routing.tap import Tap
from moectl.text import escape
from moectl.traces.store import Recording, bytes_per_token

SEQUENCE_LENGTH = 1024
BATCH_TOKENS = 4096
LAYERWISE_TOKENS = 16384
"""Of a batch that every layer is read from disk for."""

_LOGITS = 1 << 27
"""Most logits at once, if the predicted tokens are recorded: 512 MiB in fp32."""

_PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run.

    Attributes:
        max_tokens: tokens that are read; every domain has an equal share of them.
        sequence_length: tokens that are seen together; `SEQUENCE_LENGTH`, or what the model can take, if not given.
        batch_tokens: tokens of a forward pass; `BATCH_TOKENS`, or layer by layer `LAYERWISE_TOKENS`, if not given.
        split: which documents of the data.
        scores: record the routers' scores.
        predicted: record the token that the model finds most likely after each.
        trace_bytes: the most memory that the trace may take; what is counted over all tokens is not limited by it.
        generate: so many tokens after each document, which is then cut to `sequence_length`; an end of text does not
            stop it.
        layerwise: one layer in memory at a time.
        device, dtype, experts_implementation: as `moectl eval` has them.
        seed: chooses the documents of the trace.
    """

    max_tokens: int = 65536
    sequence_length: int | None = None
    batch_tokens: int | None = None
    split: Split = "all"
    scores: bool = True
    predicted: bool = True
    trace_bytes: int = 256 << 20
    generate: int = 0
    layerwise: bool = False
    device: str = "auto"
    dtype: str = "auto"
    experts_implementation: str | None = None
    seed: int = 0


def record(
    checkpoint: Checkpoint,
    data: Sequence[str],
    settings: Settings = Settings(),
    say: Callable[[str], None] = lambda _text: None,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> dict[str, Recording]:
    """The recordings of the model's streams, `decoder` and, where there is one, `encoder`.

    Under torchrun every process reads its share of the documents; the first returns all of them and the others nothing.
    `say` hears what is about to happen, and `advance` how many more tokens were read.

    Raises:
        UsageError: the settings contradict each other or the model.
        InputError: the checkpoint or the data cannot be used, or what the model does cannot be seen.
        MachineError: there is no such device, or the Hub cannot be reached.
    """
    config = read_config(checkpoint)
    length = _sequence_length(checkpoint, config, settings)
    device = own_device(device_named(settings.device))
    tokenizer = load_tokenizer(checkpoint)
    cut = length if settings.generate else None
    documents = read_documents(data, settings.split)
    texts = read_texts(documents, encoder(tokenizer), settings.max_tokens, cut)
    if not texts.ids_N:
        raise InputError("The data holds no token.", "There is nothing to route.", "Give --data some text.")
    rank, size = rank_and_size()
    if len(texts.ids_N) < size:
        raise UsageError(
            f"There are {size} processes and {len(texts.ids_N)} documents.",
            "Every process reads some of the documents.",
            "Start fewer processes, or give more text.",
        )
    if rank:
        say, advance = lambda _text: None, lambda _tokens: None
    say(f"Reading {int(texts.length_N.sum()):,} tokens in {len(texts.ids_N):,} documents of {', '.join(texts.domains)}")
    with quiet(), torch.no_grad():
        run = _opened(checkpoint, config, settings, device, tokenizer)
        check_ids(checkpoint, run.model, texts.ids_N)
        recorders = _record(run, texts, length, settings, say, advance)
        about = {
            "model": checkpoint.name,
            "data": list(data),
            "split": settings.split,
            "tokens": int(texts.length_N.sum()),
            "sequence_length": length,
            "generate": settings.generate,
            "seed": settings.seed,
            "device": device.type,
            "dtype": str(run.model.dtype).removeprefix("torch."),
            "experts_implementation": settings.experts_implementation,
            "notes": list(run.checked.notes) if run.checked else [],
        }
    return gathered({stream: recorder.recording(about) for stream, recorder in recorders.items()})


@dataclass(slots=True)
class _Run:
    """A model that is ready, how a batch goes through it, and what is known of its taps so far."""

    model: Any
    passes: passes.Passes
    pad: bool
    batch_tokens: int
    predicted: bool
    checked: Checked | None = None


def _opened(checkpoint: Checkpoint, config: Any, settings: Settings, device: torch.device, tokenizer: Any) -> _Run:
    dtype = dtype_named(settings.dtype, device)
    if settings.layerwise:
        own = getattr(config, "dtype", None) or torch.float32
        layerwise = LayerwiseModel.open(checkpoint, own if dtype == "auto" else dtype, device)
        each = passes.layer_by_layer(layerwise, prefix(checkpoint, tokenizer), device)
        return _Run(layerwise.model, each, True, settings.batch_tokens or LAYERWISE_TOKENS, False)
    model = load(checkpoint, dtype)
    if settings.experts_implementation is not None:
        set_experts(model, settings.experts_implementation, checkpoint.name)
    model.to(device).eval()
    predicted, most = settings.predicted or bool(settings.generate), settings.batch_tokens or BATCH_TOKENS
    if predicted:
        most = max(1, min(most, _LOGITS // model.get_input_embeddings().num_embeddings))
    if config.is_encoder_decoder:
        each = passes.encoder_decoder(model, _decoder_start(model), predicted=predicted)
        return _Run(model, each, False, most, predicted)
    start = prefix(checkpoint, tokenizer)
    if settings.generate:
        return _Run(model, passes.generating(model, start, settings.generate), False, most, predicted)
    return _Run(model, passes.causal(model, start, predicted=predicted), True, most, predicted)


def _record(
    run: _Run,
    texts: Texts,
    length: int,
    settings: Settings,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> dict[str, Recorder]:
    rank, size = rank_and_size()
    own_N = np.arange(len(texts.ids_N)) % size == rank
    recorders: dict[str, Recorder] = {}
    streams: dict[str, list[int]] = {}

    def prepare(checked: Checked) -> None:
        run.checked = checked
        for note in checked.notes:
            say(note)
        for number, tap in enumerate(checked.taps):
            streams.setdefault("encoder" if tap.point.role == "encoder" else "decoder", []).append(number)
        length_N = texts.length_N + settings.generate
        points = tuple(tap.point for tap in checked.taps)
        each, most = bytes_per_token(points, scores=settings.scores), settings.trace_bytes
        kept_N = sampled_documents(length_N, each, most, settings.seed)
        kept, all_ = int(length_N[kept_N].sum()), int(length_N.sum())
        mib = f"{kept * each / 2**20:.1f} MiB of at most {most / 2**20:.0f}"
        say(f"The trace has {kept:,} of {all_:,} tokens, in whole documents: {mib}")
        for stream, numbers in streams.items():
            recorders[stream] = Recorder(
                [checked.taps[number] for number in numbers],
                texts.domains,
                texts.domain_N,
                np.where(own_N, length_N, 0),
                kept_N=kept_N & own_N,
                scores=settings.scores,
                predicted=run.predicted and stream == "decoder",
            )

    if not settings.layerwise:  # there the check is the first batch: a pass reads the whole checkpoint
        prepare(check(run.model, partial(_probe, run.model, texts)))
    own = np.flatnonzero(own_N).tolist()
    all_batches = batches(texts, own, sequence_length=length, batch_tokens=run.batch_tokens, pad=run.pad)
    taps: Sequence[Tap] | None = run.checked.taps if run.checked else None
    with Capture(run.model, scores=settings.scores or run.checked is None, taps=taps) as capture:
        for batch in all_batches:
            for rows, predicted_R in run.passes(batch):
                seen = capture.take()
                if run.checked is None:
                    prepare(complete(capture.taps, seen))
                for stream, recorder in recorders.items():
                    of_stream = [seen[number] for number in streams[stream]]
                    recorder.add(of_stream, rows[stream], predicted_R if stream == "decoder" else None)
            advance(int((batch.rows.document_R >= 0).sum()))
    return recorders


def _decoder_start(model: Any) -> int:
    places = (model.generation_config, model.config)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(place, name, None) for name in names for place in places)
    return next((value for value in found if isinstance(value, int)), 0)


def _probe(model: Any, texts: Texts) -> torch.Tensor:
    """The logits of a few tokens."""
    ids = torch.from_numpy(texts.ids_N[0][:_PROBE_TOKENS].astype(np.int64))[None].to(model.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **decoder).logits


def _sequence_length(checkpoint: Checkpoint, config: Any, settings: Settings) -> int:
    """The tokens of a row, with room for the prefix and for what is generated.

    Raises:
        UsageError: the model has too few positions, or cannot do what the settings say.
    """
    if (settings.layerwise or config.is_encoder_decoder) and settings.generate:
        what = "one layer at a time" if settings.layerwise else "as an encoder-decoder"
        raise UsageError(
            f"{escape(checkpoint.name)} runs {what}, and is to generate.",
            "Generation is recorded of decoder-only models that are in memory whole.",
            "Leave --generate out.",
        )
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or SEQUENCE_LENGTH + 1 + settings.generate
    most = positions - 1 - settings.generate
    if most < 1 or (settings.sequence_length or 1) > most:
        raise UsageError(
            f"{escape(checkpoint.name)} has {positions} positions, too few for rows of "
            f"{settings.sequence_length or 1} tokens, the token before them and {settings.generate} to generate.",
            "What it does beyond them means nothing.",
            f"Give a sequence length of at most {max(most, 1)}.",
        )
    return settings.sequence_length or min(SEQUENCE_LENGTH, most)
