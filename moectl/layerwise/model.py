"""A causal language model whose weights pass through memory one decoder layer at a time.

The model is transformers' own and its `forward` runs unchanged. Every module that owns weights (the
embedding, each decoder layer, the final norm, the head) reads them from disk just before it runs and drops
them just after. Peak memory is that of loading the largest of these (`WeightLoader`) plus the activations of
all sequences of a call, because one pass runs over all of [B, L] at once: hidden states take B * L * D numbers,
logits B * L * V. Shapes: B sequences, L tokens each, D hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moectl.checkpoint.source import Checkpoint
from moectl.layerwise.loading import WeightLoader
from moectl.layerwise.skeleton import build, decoder_layers


@dataclass
class LayerCall:
    """One decoder layer at its turn: its weights are in memory now, and gone when the visitor returns.

    Attributes:
        index: which layer, from 0.
        module: the layer. Its parameters may be read, and changed for this call; submodules may get hooks.
        hidden_states: what comes in, [B, L, D].
    """

    index: int
    module: nn.Module
    hidden_states: Tensor
    _forward: Callable[[Tensor], Any]
    _rest: tuple[Any, ...] | None = field(default=None, init=False)

    def run(self, hidden_states: Tensor | None = None) -> Tensor:
        """What the layer makes of its input or of other hidden states [B, L, D]; may be called repeatedly."""
        output = self._forward(self.hidden_states if hidden_states is None else hidden_states)
        if isinstance(output, tuple):
            output, *rest = output
            self._rest = tuple(rest)
        return output

    def _result(self, hidden_states: Tensor) -> Any:
        """`hidden_states` in the form in which this family's layers return them."""
        return hidden_states if self._rest is None else (hidden_states, *self._rest)


Visitor = Callable[[LayerCall], Tensor]
"""Called in place of each decoder layer, in order; returns the hidden states [B, L, D] the next one gets.

`lambda layer: layer.run()` changes nothing. Calibration runs the layer to see its inputs, changes its weights
and returns a second run; routing capture hooks the router, runs once and removes the hook.
"""


class LayerwiseModel:
    """A checkpoint that runs without ever being whole in memory.

    Attributes:
        checkpoint: what the weights are read from.
        model: the transformers model; it may be called directly too, with any arguments its family takes.
        num_layers: how many decoder layers there are.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, loader: WeightLoader) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self._loader = loader
        self._visit: Visitor | None = None
        prefix, layers = decoder_layers(checkpoint, model)
        self.num_layers = len(layers)
        held = units(loader.names, prefix)
        for index in range(self.num_layers):
            path = f"{prefix}.{index}"
            self._stream(path, held.pop(path, ()), index)
        for path, names in held.items():
            self._stream(path, names)

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> LayerwiseModel:
        """Build the model and check the name and shape of every tensor against it; no weights are read yet.

        Args:
            checkpoint: any unquantised decoder-only checkpoint whose architecture transformers has.
            dtype: what to compute in; weights are converted as they are read.
            device: where to compute.

        Raises:
            InputError: the architecture is not supported, or a tensor is missing, unexpected or misshapen.
        """
        model = build(checkpoint, dtype, device)
        return cls(checkpoint, model, WeightLoader(model, checkpoint, dtype, device))

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers configuration."""
        return self.model.config

    def run(self, input_ids: Tensor, visit: Visitor | None = None) -> Tensor:
        """The final hidden states [B, L, D] of token ids [B, L]; the head is not read.

        Raises:
            InputError: a weight file was cut or modified since the checkpoint was opened.
        """
        return self._pass(self.model.get_decoder(), input_ids, visit).last_hidden_state

    def logits(self, input_ids: Tensor, visit: Visitor | None = None) -> Tensor:
        """The logits [B, L, V] of token ids [B, L].

        Raises:
            InputError: a weight file was cut or modified since the checkpoint was opened.
        """
        return self._pass(self.model, input_ids, visit).logits

    def _pass(self, module: nn.Module, input_ids: Tensor, visit: Visitor | None) -> Any:
        self._visit = visit
        try:
            with torch.no_grad():
                output = module(input_ids=input_ids, use_cache=False)
        finally:
            self._visit = None
        self.checkpoint.check_unchanged()
        return output

    def _stream(self, path: str, names: Sequence[str], index: int | None = None) -> None:
        """Have the module at `path` hold the weights `names` only while it runs."""
        module = self.model.get_submodule(path)
        forward = module.forward

        @wraps(forward)
        def streamed(*args: Any, **kwargs: Any) -> Any:
            with self._loader.loaded(names):
                if index is None or self._visit is None:
                    return forward(*args, **kwargs)
                layer = LayerCall(index, module, *_with_input(forward, args, kwargs))
                return layer._result(self._visit(layer))

        module.forward = streamed


def units(names: Sequence[str], prefix: str) -> dict[str, list[str]]:
    """Parameter names by the module that holds them: a whole decoder layer, or the module they belong to."""
    layer = re.compile(rf"{re.escape(prefix)}\.\d+(?=\.)")
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = layer.match(name)
        found[match.group() if match else name.rpartition(".")[0]].append(name)
    return found


def _with_input(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The hidden states among a layer's arguments, and the call as a function of them alone."""
    if args:
        return args[0], lambda hidden_states: forward(hidden_states, *args[1:], **kwargs)
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], lambda hidden_states: forward(hidden_states=hidden_states, **others)
