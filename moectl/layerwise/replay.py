"""One decoder layer of a checkpoint at a time, over any number of batches, from what the layer before it returned.

The model's own `forward` is called for every batch and every layer, with the layers before the one in turn replaced by
what the last of them returned, and left as soon as that one has run. So masks, rotary embeddings and whatever else a
family hands its layers are made by transformers, for the right tokens. What stands outside the layers is read when it
is first called, and stays for as long as the layer does.

An encoder-decoder is one sequence of layers, the encoder's and then the decoder's; the latter are also handed what the
encoder's last returned.

Shapes: B sequences, L tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.layerwise.leaks import Made
from moectl.layerwise.loading import WeightLoader
from moectl.layerwise.skeleton import all_layers, build
from moectl.text import escape

Returned = tuple[Any, dict[str, dict[Any, Any]]]
"""What a layer returned, and what it and those before it put into mappings that all are handed, by the argument.

Gemma 4 shares keys and values in such a mapping.
"""

Tokens = Tensor | tuple[Tensor, Tensor]
"""Token ids [B, L]; of an encoder-decoder those of the source and those of the target."""

Prepare = Callable[[str, nn.Module], object]
"""Called with the name of a decoder layer, or of a module outside, and the module, when its weights have been read."""

Visit = Callable[[Callable[[], Any]], Any]
"""Called in the place of a layer, with what runs it."""


class Left(Exception):
    """Leaves a forward pass that has given what is wanted."""


class Replay:
    """A checkpoint whose decoder layers run one at a time, each over all batches before the next one is read.

    Attributes:
        checkpoint: what the weights are read from.
        model: the transformers model, its experts in their eager implementation.
        names, layers: the layers, in order.
        encoders: how many of them are an encoder's, which come first.
        outside: the weights that are in no layer, by the module that holds them.
        prepare: sees, and may change, the weights of every layer and module that has been read.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, loader: WeightLoader) -> None:
        self.checkpoint = checkpoint
        self.model = model
        layers, self.encoders = all_layers(checkpoint, model)
        self.names, self.layers = list(layers), list(layers.values())
        self.prepare: Prepare = lambda name, module: None
        self._loader = loader
        self._stack: ExitStack | None = None
        self._turn = -1
        self._visit: Visit | None = None
        self._before: Returned | None = None
        self._encoded: Returned | None = None
        self._after: Returned | None = None
        held = units(loader.names, self.names)
        self._inside = [held.pop(name, []) for name in self.names]
        self.outside = held
        for path, names in self.outside.items():
            self._read_when_called(path, names)
        for index, layer in enumerate(self.layers):
            self._replace(index, layer)

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Replay:
        """Build the model and check the name and shape of every tensor against it; no weights are read yet.

        Args:
            checkpoint: any unquantised language model whose architecture transformers has.
            dtype: what to compute in; weights are converted as they are read.
            device: where to compute.

        Raises:
            InputError: the architecture is not supported, or a tensor is missing, unexpected or misshapen.
        """
        model = build(checkpoint, dtype, device, "eager", two_stacks=True)
        return cls(checkpoint, model, WeightLoader(model, checkpoint, dtype, device))

    @property
    def sources(self) -> Mapping[str, Sequence[str]]:
        """The tensors on disk that each parameter is made of."""
        return self._loader.sources

    @contextmanager
    def read(self, path: str) -> Iterator[nn.Module]:
        """Inside, a module outside the layers, one of `outside`, has its own weights."""
        with self._loader.loaded(self.outside[path]), torch.no_grad():
            module = self.model.get_submodule(path)
            self.prepare(path, module)
            yield module

    @contextmanager
    def turn(self, index: int) -> Iterator[nn.Module]:
        """Inside, a decoder layer is in memory and can be run.

        Raises:
            InputError: a weight file was cut or modified since the checkpoint was opened.
        """
        with ExitStack() as self._stack, torch.no_grad():
            self._stack.enter_context(self._loader.loaded(self._inside[index]))
            self.checkpoint.check_unchanged()
            self.prepare(self.names[index], self.layers[index])
            self._turn = index
            try:
                yield self.layers[index]
            finally:
                self._turn, self._stack = -1, None

    def run(
        self,
        tokens: Tokens,
        before: Returned | None,
        encoded: Returned | None = None,
        visit: Visit = lambda run: run(),
    ) -> Returned:
        """What the layer in turn returns for some tokens.

        Args:
            before: what the layer before it in its stack returned for them; None for the first.
            encoded: what the last layer of the encoder did; for layers of a decoder that has one.
            visit: called in place of the layer.

        Raises:
            Left: `visit` did.
        """
        device = self.model.device
        everything = tree_map_only(Tensor, lambda tensor: tensor.to(device), (tokens, before, encoded))
        tokens, self._before, self._encoded = everything
        self._visit, self._after = visit, None
        try:
            if isinstance(tokens, tuple):
                self.model(input_ids=tokens[0], decoder_input_ids=tokens[1], use_cache=False)
            else:
                self.model.get_decoder()(input_ids=tokens, use_cache=False)
        except Left:
            if self._after is None:
                raise
            return self._after
        finally:
            self._before = self._encoded = self._visit = self._after = None
        raise AssertionError("the layer in turn was not called")

    def run_watched(self, tokens: Tokens, before: Returned | None, encoded: Returned | None = None) -> Returned:
        """The same, and a look at whether that is all that the layer leaves for others.

        Raises:
            InputError: it keeps tensors elsewhere, so that later layers could not be run from what it returned.
        """
        made = Made()

        def watched(run: Callable[[], Any]) -> Any:
            with made:
                return run()

        after = self.run(tokens, before, encoded, watched)
        kept = made.kept(after)
        if kept:
            raise InputError(
                f"{escape(self.checkpoint.name)}: layer {self._turn} keeps {len(kept)} tensors that it does not return "
                f"({list(kept[0])} is one).",
                "A later layer may look at them, so layers cannot be run one after another from what each returned.",
                "Report it: its family needs support of its own.",
            )
        return after

    def _read_when_called(self, path: str, names: Sequence[str]) -> None:
        module = self.model.get_submodule(path)
        forward = module.forward
        read: list[ExitStack] = []

        @wraps(forward)
        def reading(*given: Any, **named: Any) -> Any:
            if self._stack is not None and self._stack not in read:
                read[:] = [self._stack]
                self._stack.enter_context(self._loader.loaded(names))
                self.prepare(path, module)
            return forward(*given, **named)

        module.forward = reading

    def _replace(self, index: int, layer: nn.Module) -> None:
        forward = layer.forward

        @wraps(forward)
        def replaced(*given: Any, **named: Any) -> Any:
            mappings = {
                str(key): value
                for key, value in [*enumerate(given), *named.items()]
                if isinstance(value, MutableMapping)
            }
            if index < self._turn:
                in_encoder = index < self.encoders <= self._turn
                before = self._encoded if in_encoder else self._before
                assert before is not None
                output, shared = before
                if index + 1 < (self.encoders if in_encoder else self._turn):
                    # What comes between layers may write into it.
                    return tree_map_only(Tensor, torch.clone, output)
                for key, entries in shared.items():
                    mappings[key].update(entries)
                return output
            assert self._visit is not None
            found = {key: dict(mapping) for key, mapping in mappings.items()}
            output = self._visit(lambda: forward(*given, **named))
            earlier = self._before[1] if self._before else {}
            shared = {key: earlier.get(key, {}) | _changed(found[key], mapping) for key, mapping in mappings.items()}
            self._after = output, {key: entries for key, entries in shared.items() if entries}
            raise Left

        layer.forward = replaced


def units(names: Sequence[str], layers: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names by the module that holds them: one of the layers, or the module they belong to."""
    found: dict[str, list[str]] = {}
    known = set(layers)
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:length]) for length in range(1, len(parts)))
        owner = next((path for path in paths if path in known), name.rpartition(".")[0])
        found.setdefault(owner, []).append(name)
    return found


def _changed(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in after.items() if key not in before or before[key] is not value}
