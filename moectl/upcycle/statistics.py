"""Router rows from text: what the router of each layer will see of the texts that an expert should get.

A row is the mean of the FFN's input (behind the norm before the FFN, where the family has one) over the tokens of the
expert's texts, less that over its negative texts, less the mean of all experts' rows, times one factor per layer. A
softmax router does not see what all rows have in common, and bfloat16 then keeps more of what they differ by. The
factor makes the logits' deviation over the experts, root mean square over all tokens of all texts, what was asked for.

Rows are Statistics: a small safetensors file beside the output, which is a source of the plan; its sha256 is in the
plan's fingerprint. Legend: T tokens of all texts, H hidden, E experts, L longest text, B texts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moectl.checkpoint.kept import identity, kept
from moectl.checkpoint.source import Checkpoint
from moectl.data.documents import read_documents
from moectl.errors import InputError, UsageError
from moectl.families.registry import DENSE
from moectl.families.spec import FusedMlp, GatedMlp
from moectl.text import escape, shown
from moectl.upcycle.btx_recipe import BtxRecipe, Expert

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512
"""Of a text that are read; a row is a mean, which hundreds of tokens make."""
MAX_DOCUMENTS = 32
"""Taken from each expert's data."""
PASS_TOKENS = 16_384
"""Run at once: what bounds memory, since a pass reads every layer once for all of its texts."""


@dataclass(frozen=True)
class Texts:
    """The texts of one router row."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


Observe = Callable[["_Row", int, np.ndarray], None]
"""Told of a text, a layer and the vectors [T, H], float32, that the layer's router sees of the tokens that count."""


def texts_of(expert: Expert) -> Texts:
    """Prompts and documents of an expert.

    Raises:
        InputError: its data cannot be read.
    """
    documents: Iterator[str] = iter(())
    if expert.data:
        documents = (document.text for document in islice(read_documents(expert.data, "train"), MAX_DOCUMENTS))
    return Texts((*expert.prompts, *documents), expert.negative_prompts)


def router_statistics(
    base: Checkpoint,
    experts: Sequence[Expert],
    recipe: BtxRecipe,
    layers: Sequence[int],
    directory: Path,
    *,
    gate: Expert | None = None,
) -> Checkpoint:
    """The router rows of some layers as a safetensors file in `directory`, named after all that decides them.

    A file that is there is taken as it is, so a command that is run again, or by several workers, plans the same.
    Tensors are float32: layers.{layer}.router [E, H], and with `gate` layers.{layer}.shared_gate [1, H].

    Raises:
        InputError: there is no tokenizer or no usable text, or the base model cannot be run.
        UsageError: all experts have the same texts.
    """
    texts = [texts_of(expert) for expert in (*experts, *((gate,) if gate else ()))]
    if len(experts) > 1 and len(set(texts[: len(experts)])) == 1:
        raise UsageError(
            "All experts have the same texts.",
            "Their router rows would be the same, and the router would choose by rounding.",
            "Give each expert texts of its own, or --router-init random.",
        )

    def compute() -> dict[str, np.ndarray]:
        look = _embeddings if recipe.router_init == "embedding" else _router_inputs
        rows = _encoded(base, texts, recipe.router_tokens)
        return _rows(partial(look, base, rows, layers), layers, len(experts), recipe)

    return kept(directory, "router", _decides(base, texts, recipe, layers, gate is not None), compute)


def _rows(
    look: Callable[[Observe], None], layers: Sequence[int], experts: int, recipe: BtxRecipe
) -> dict[str, np.ndarray]:
    """The statistics' tensors, from two looks at the texts: one for the rows, one for the spread of their logits."""
    sums: dict[tuple[int, int, bool], tuple[int, np.ndarray]] = {}

    def add(row: _Row, layer: int, vectors: np.ndarray) -> None:
        key = (layer, row.expert, row.negative)
        count, total = sums.get(key, (0, np.zeros(vectors.shape[1])))
        sums[key] = (count + len(vectors), total + vectors.sum(axis=0, dtype=np.float64))

    look(add)

    def difference(layer: int, expert: int) -> np.ndarray:
        count, total = sums[layer, expert, False]
        less_count, less = sums.get((layer, expert, True), (1, np.zeros(1)))
        return np.asarray(total / count - less / less_count)

    raw = {layer: np.stack([difference(layer, expert) for expert in range(experts)]) for layer in layers}
    rows = {layer: each - each.mean(axis=0) if experts > 1 else each for layer, each in raw.items()}
    has_gate = (layers[0], experts, False) in sums
    gates = {layer: difference(layer, experts) for layer in layers} if has_gate else {}
    spread, gate_spread = _Mean(), _Mean()

    def measure(row: _Row, layer: int, vectors: np.ndarray) -> None:
        if not row.negative and row.expert < experts:
            spread.add(layer, ((vectors @ rows[layer].T) ** 2).mean(axis=1))
        elif not row.negative:
            gate_spread.add(layer, (vectors @ gates[layer]) ** 2)

    look(measure)
    arrays = {}
    for layer in layers:
        if experts > 1 and np.abs(rows[layer]).max() <= 1e-6 * np.abs(raw[layer]).max():
            raise UsageError(
                f"The texts of all experts look the same to the router of layer {layer}.",
                "Its rows would be rounding alone.",
                "Give texts that differ, or --router-init random.",
            )
        arrays[f"layers.{layer}.router"] = (rows[layer] * recipe.router_logit_std / spread.root(layer)).astype("f4")
        if has_gate:
            row = gates[layer] * recipe.router_logit_std / gate_spread.root(layer)
            arrays[f"layers.{layer}.shared_gate"] = row[None].astype("f4")
    return arrays


class _Mean:
    """Root mean squares by layer, over values that come in parts."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, float]] = {}

    def add(self, layer: int, squares: np.ndarray) -> None:
        count, total = self._sums.get(layer, (0, 0.0))
        self._sums[layer] = (count + len(squares), total + float(squares.sum()))

    def root(self, layer: int) -> float:
        count, total = self._sums[layer]
        return math.sqrt(total / count) or 1.0


def _router_inputs(base: Checkpoint, texts: Sequence[_Row], layers: Sequence[int], observe: Observe) -> None:
    """Show what goes into the FFN of each layer, by running the base model layer by layer."""
    import torch

    from moectl.layerwise.model import LayerCall, LayerwiseModel

    model = LayerwiseModel.open(base)
    place, wanted = _ffn_module(base), set(layers)
    for rows in _passes(texts):
        longest = max(len(row.ids) for row in rows)
        # Tokens to the right of a text change nothing in it, since every family here looks back only: no mask needed.
        ids_BL = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids_BL[i, : len(row.ids)] = torch.tensor(row.ids)

        def visit(call: LayerCall, rows: Sequence[_Row] = rows) -> torch.Tensor:
            if call.index not in wanted:
                return call.run()
            seen: list[torch.Tensor] = []

            def look(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append(args[0] if args else kwargs["hidden_states"])

            hook = call.module.get_submodule(place).register_forward_pre_hook(look, with_kwargs=True)
            try:
                output = call.run()
            finally:
                hook.remove()
            for i, row in enumerate(rows):
                observe(row, call.index, seen[0][i, list(row.counted)].float().cpu().numpy())
            return output

        model.run(ids_BL, visit)


def _embeddings(base: Checkpoint, texts: Sequence[_Row], layers: Sequence[int], observe: Observe) -> None:
    """Show token embeddings over their root mean square, as a norm would hand them on: the same for every layer."""
    table = base.read(DENSE[base.model_type].tensors[0].name)
    for row in texts:
        vectors = table[[row.ids[i] for i in row.counted]].astype(np.float64)
        size = np.sqrt((vectors**2).mean(axis=1, keepdims=True))
        for layer in layers:
            observe(row, layer, (vectors / np.maximum(size, 1e-12)).astype(np.float32))


@dataclass(frozen=True)
class _Row:
    """One text as token ids, and which of them count."""

    expert: int
    negative: bool
    ids: tuple[int, ...]
    counted: tuple[int, ...]


def _encoded(base: Checkpoint, texts: Sequence[Texts], tokens: str) -> list[_Row]:
    """Every text as the tokenizer has it; what it adds itself (<bos>, the same for all texts) is read, not counted."""
    from moectl.layerwise.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    special, size = set(tokenizer.all_special_ids), base.config.get("vocab_size")
    rows = []
    for expert, each in enumerate(texts):
        for negative, group in ((False, each.positive), (True, each.negative)):
            for text in group:
                ids = tuple(tokenizer(text)["input_ids"][:MAX_TOKENS])
                counted = tuple(i for i, token in enumerate(ids) if token not in special)
                if counted and isinstance(size, int) and max(ids) >= size:
                    raise InputError(
                        f"{escape(base.name)}: its tokenizer gives token {max(ids)}, its vocab_size is {size}.",
                        "The tokenizer belongs to another model.",
                        "Fetch the tokenizer of this model.",
                    )
                if counted:
                    rows.append(_Row(expert, negative, ids, counted[-1:] if tokens == "last" else counted))
        if not any(row.expert == expert and not row.negative for row in rows):
            raise InputError(
                f"The texts of expert {expert} hold no token ({shown(list(each.positive), 60)}).",
                "There is nothing to make its router row of.",
                "Give it text.",
            )
    return rows


def _passes(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of about one length together, as many as a pass may have tokens."""
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if group and len(group[0].ids) * (len(group) + 1) > PASS_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _ffn_module(base: Checkpoint) -> str:
    """The name of the FFN's module in a layer, from the name of its first matrix on disk."""
    mlp = DENSE[base.model_type].mlp
    name = mlp.gate if isinstance(mlp, GatedMlp) else mlp.gate_up if isinstance(mlp, FusedMlp) else mlp.up
    return name.partition("{layer}.")[2].partition(".")[0]


def _decides(base: Checkpoint, texts: Sequence[Texts], recipe: BtxRecipe, layers: Sequence[int], gate: bool) -> Any:
    """Everything the rows follow from."""
    return {
        **identity(base),
        "tokenizer": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.side_files()},
        "texts": [[list(each.positive), list(each.negative)] for each in texts],
        "layers": list(layers),
        "how": [recipe.router_init, recipe.router_tokens, recipe.router_logit_std, MAX_TOKENS, gate],
    }
