"""Measuring how much experts matter: on data, one layer of the model in memory at a time, or in the weights alone.

Legend: B sequences, L tokens each, T tokens of a pass, K experts per token, S routed rows (T * K), D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moectl.checkpoint.dtypes import FLOATS, numpy_dtype
from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.layout import Layout, layer_of
from moectl.compress.prune.scores import GATED, NORMS, TOKENS, WEIGHTS, Measured
from moectl.errors import InputError
from moectl.layerwise.experts import choice, takes_choice
from moectl.layerwise.model import LayerCall, LayerwiseModel
from moectl.text import escape

PASS_TOKENS = 16_384
"""Run at once: what bounds memory, since a pass reads every layer once for all of its tokens."""
_ROWS = 8192
"""Routed rows whose outputs are in memory at once."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the experts of a layer were given, while the layer's weights are in memory.

    Attributes:
        layer: its number.
        experts, block: the experts, and the module they stand in beside their router.
        again: runs the block once more on the same input.
        x_TD, index_TK, weight_TK: hidden states, chosen experts, and what their outputs are multiplied with.
    """

    layer: int
    experts: nn.Module
    block: nn.Module
    again: Callable[[], Any]
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor


Look = Callable[[Call], None]


def routed_scores(model: LayerwiseModel, token_BL: np.ndarray, layout: Layout) -> Measured:
    """Tokens, sums of output norms, and sums of gate times output norm of every expert, in float64.

    The norm is that of the expert's output before the gate; the gate is the weight that the model itself gives the
    output, so renormalised where the family renormalises.

    Raises:
        InputError: a layer's experts cannot be watched, or what they compute is not finite.
    """
    sums = {layer: {name: np.zeros(layout.experts) for name in (TOKENS, NORMS, GATED)} for layer in layout.layers}

    def look(call: Call) -> None:
        of_layer, top_k = sums[call.layer], call.index_TK.shape[1]
        index_S, gate_S = call.index_TK.flatten(), call.weight_TK.flatten()
        row_S = torch.arange(len(index_S), device=index_S.device)
        row_S = row_S[(index_S >= 0) & (index_S < layout.experts)]
        for rows in row_S.split(_ROWS):
            expert, gate = index_S[rows], gate_S[rows].double()
            norm = outputs(call.experts, call.x_TD[rows // top_k], expert).double().norm(dim=-1)
            for name, value in ((TOKENS, torch.ones_like(norm)), (NORMS, norm), (GATED, gate.abs() * norm)):
                summed = torch.bincount(expert, weights=value, minlength=layout.experts)
                of_layer[name] += summed.cpu().numpy()
        if not np.isfinite(of_layer[GATED]).all():
            raise not_finite(layout, call.layer)

    at_once = max(1, PASS_TOKENS // token_BL.shape[1])
    for start in range(0, len(token_BL), at_once):
        watch(model, token_BL[start : start + at_once], layout, look)
    return sums


def outputs(experts: nn.Module, x_SD: Tensor, index_S: Tensor) -> Tensor:
    """What one expert each makes of rows [S, D]: the module itself, called as for a single expert per token."""
    return experts(x_SD, index_S[:, None], torch.ones_like(index_S[:, None], dtype=x_SD.dtype))


def watch(model: LayerwiseModel, token_BL: np.ndarray, layout: Layout, look: Look) -> None:
    """Run the model over token ids [B, L] and show what the experts of every MoE layer are given.

    Raises:
        InputError: a layer that has experts on disk does not call them with a choice.
    """
    wanted = set(layout.layers)

    def visit(call: LayerCall) -> Tensor:
        if call.index not in wanted:
            return call.run()
        found = [name for name, module in call.module.named_modules() if takes_choice(module)]
        if len(found) != 1:
            raise InputError(
                f"{escape(layout.source.name)}: layer {call.index} gives {len(found)} modules a choice of experts.",
                "Which tokens its experts are given cannot be seen.",
                "Use --method aimer, which needs no data.",
            )
        experts = call.module.get_submodule(found[0])
        block = call.module.get_submodule(found[0].rpartition(".")[0])
        given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given[module] = arguments, named

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in (experts, block)]
        try:
            output = call.run()
        finally:
            for hook in hooks:
                hook.remove()

        def again() -> Any:
            return call.run() if block is call.module else block(*given[block][0], **given[block][1])

        look(Call(call.index, experts, block, again, *choice(experts, *given[experts])))
        return output

    model.run(torch.from_numpy(token_BL).to(model.model.device), visit)


def weight_scores(layout: Layout) -> Measured:
    """Root mean square over mean magnitude of each expert's matrices, taken as one: the inverse of AIMER's score.

    AIMER (arXiv 2603.18492) drops the experts whose mean magnitude is largest beside their root mean square. An expert
    of zeros has 0, and goes first.

    Raises:
        InputError: a matrix holds NaN or infinity, or is not floating point.
    """
    sums = {layer: np.zeros((3, layout.experts)) for layer in layout.layers}
    for layer, expert, ref in layout.matrices():
        for magnitude in _chunks(ref):
            if not np.isfinite(magnitude).all():
                raise nonfinite(ref)
            sums[layer][:, expert] += magnitude.size, magnitude.sum(), (magnitude**2).sum()
    found = {}
    for layer, (count_E, total_E, square_E) in sums.items():
        mean_E = total_E / count_E
        found[layer] = {WEIGHTS: np.where(total_E > 0, np.sqrt(square_E / count_E) / np.where(mean_E, mean_E, 1), 0.0)}
    return found


def nonfinite(ref: TensorRef) -> InputError:
    """The error for a weight that is not finite."""
    return InputError(
        f"{escape(str(ref.file))}: tensor {escape(ref.name)!r} holds NaN or infinity.",
        "How much its experts matter cannot be told, and every output of such a model can be NaN.",
        "Fetch the checkpoint again, or mend the tensor.",
    )


def not_finite(layout: Layout, layer: int) -> InputError:
    """The error for outputs that are not finite: the first tensor up to that layer that explains it, or none."""
    names = [ref for each in (None, *range(layer + 1)) for ref in _of_layer(layout, each)]
    for ref in names:
        if ref.dtype in FLOATS and not all(np.isfinite(chunk).all() for chunk in _chunks(ref)):
            return nonfinite(ref)
    return InputError(
        f"{escape(layout.source.name)}: what the experts of layer {layer} compute is not finite.",
        "Its weights are, so it overflows in the type it is computed in.",
        "Give --dtype float32.",
    )


def _of_layer(layout: Layout, layer: int | None) -> list[TensorRef]:
    return [ref for name, ref in layout.source.tensors.items() if layer_of(name) == layer]


def _chunks(ref: TensorRef) -> Iterator[np.ndarray]:
    """Magnitudes of a tensor's elements, float64, in pieces."""
    if ref.dtype not in FLOATS:
        raise InputError(
            f"{escape(str(ref.file))}: tensor {escape(ref.name)!r} is {ref.dtype}, not floating point.",
            "A quantised expert's codes say little about its weights.",
            "Give --scores that were measured on the unquantised checkpoint.",
        )
    for piece in Checkpoint.chunks(ref):
        yield np.abs(np.frombuffer(piece, numpy_dtype(ref.dtype)).astype(np.float64))
