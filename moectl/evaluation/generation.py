"""Text that a model writes after a prompt, as it comes, and how fast it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.integrations.implementation import set_experts
from moectl.integrations.routed.depth import HeldLayer
from moectl.layerwise.memory import resident
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config
from moectl.layerwise.tokenizer import load_tokenizer, prefix
from moectl.layerwise.whole import device_named, dtype_named, load
from moectl.text import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Settings:
    """How to write.

    Attributes:
        max_new_tokens: at most so many, fewer where the model ends its text.
        temperature: of sampling from the model's own probabilities; 0 takes the likeliest token each time.
        seed: of sampling.
        device, dtype: what to compute on and in, as `--device` and `--dtype` have them.
        experts: which implementation experts run on; None for ours where they are coded, else transformers' default.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    experts: str | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """What was written.

    Attributes:
        text: without the prompt.
        prompt_tokens, new_tokens: how many; the end of text counts.
        prompt_seconds: from the start to the first token.
        seconds: from the first token to the last.
        peak_bytes: the most memory taken, of a GPU or of the process with the model in it; None where it is not known.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else None


def generate(checkpoint: Checkpoint, prompt: str, settings: Settings, on_text: Callable[[str], object]) -> Generated:
    """Load a model, decoder-only or encoder-decoder, and have it continue or answer a prompt.

    `on_text` hears of the text piece by piece, as soon as a word is complete.

    Raises:
        UsageError: there is no such device, dtype or implementation, or prompt and text are too long for the model.
        InputError: model or tokenizer cannot be used.
        MachineError: there is no such device here.
    """
    device = device_named(settings.device)
    dtype = dtype_named(settings.dtype, device)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(prompt, verbose=False).input_ids or [prefix(checkpoint, tokenizer)]
    _check_length(checkpoint, len(ids), settings.max_new_tokens)
    with quiet():
        model = load(checkpoint, dtype)
        if settings.experts is not None:
            set_experts(model, settings.experts, checkpoint.name)
        return write(model.to(device).eval(), tokenizer, ids, settings, on_text)


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: Any, ids: list[int], settings: Settings, on_text: Callable[[str], object]
) -> Generated:
    """The same with a model that is loaded, from token ids."""
    token_1L = torch.tensor([ids], device=model.device)
    sampling = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    how = GenerationConfig(
        do_sample=bool(sampling),
        max_new_tokens=settings.max_new_tokens,
        use_cache=not any(isinstance(module, HeldLayer) for module in model.modules()),
        pad_token_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        **sampling,
    )
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(settings.seed)
    streamer = _Streamer(tokenizer, on_text)
    started = perf_counter()
    model.generate(token_1L, attention_mask=torch.ones_like(token_1L), generation_config=how, streamer=streamer)
    first, last = streamer.times[0], streamer.times[-1]
    return Generated(
        text="".join(streamer.pieces),
        prompt_tokens=len(ids),
        new_tokens=len(streamer.times),
        prompt_seconds=first - started,
        seconds=last - first,
        peak_bytes=torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resident("VmHWM"),
    )


class _Streamer(TextStreamer):
    """Passes text on, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.pieces: list[str] = []
        self._on_text = on_text
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self.times.append(perf_counter())
        self._begun = True  # the prompt comes first
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self._on_text(text)


def _check_length(checkpoint: Checkpoint, given: int, new: int) -> None:
    config = read_config(checkpoint)
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = max(given, new) if config.is_encoder_decoder else given + new
    if positions is not None and needed > positions:
        raise UsageError(
            f"{escape(checkpoint.name)} has {positions} positions: the prompt takes {given}, --max-new-tokens {new}.",
            "Beyond them it has never been trained.",
            "Give a shorter prompt, or fewer new tokens.",
        )
