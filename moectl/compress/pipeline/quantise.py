"""The experts of a layer quantised, a batch of them at a time, and put in the places of what they were.

Legend: E experts, G of a batch, R outputs, N inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from moectl.compress.pipeline.finite import overflow, require_finite
from moectl.compress.pipeline.layer import LayerWork
from moectl.compress.pipeline.moments import Moments, from_choices, from_passes
from moectl.compress.pipeline.observe import Observed, all_given, observe
from moectl.compress.pipeline.report import MatrixReport, matrix_reports, stored_bits
from moectl.compress.quantise.piece import Piece
from moectl.layerwise.malloc import give_back
from moectl.layerwise.stored import read_tree, write_tree


def quantise(work: LayerWork) -> tuple[dict[str, Any], list[MatrixReport]]:
    """Replace the experts' matrices by what is stored of them.

    Returns:
        in the first process the tensors to store, and of every matrix what became of it.

    Raises:
        InputError: weights or activations are not finite, or what experts are given cannot be seen.
        UsageError: the settings want more than can be seen.
    """
    if not work.parameters:
        return {}, []
    observed = observe(work)
    size = work.settings.batch_experts
    starts = range(0, observed.experts, size)
    loads = [sum(int(tokens[start : start + size].sum()) for tokens in observed.tokens) for start in starts]
    for place in work.ranks.shared(loads):
        _quantise_batch(work, observed, starts[place])
        work.advance(0.25 + 0.5 * place / len(starts))
    work.ranks.wait()
    return _put(work, observed, starts)


def _quantise_batch(work: LayerWork, observed: Observed, start: int) -> None:
    """Quantise the experts from `start` on, into files."""
    settings, stop = work.settings, start + work.settings.batch_experts
    todo = [place for place, stack in enumerate(observed.stacks) if start < stack.experts]
    if all(work.file(f"piece-{place}", start).exists() for place in todo):
        return
    moments = Moments.none(observed.stacks, start, stop, settings.device)
    caps = [max(1, int(settings.cap * float(tokens.double().mean()))) for tokens in observed.tokens]
    if work.experts is None:
        passes = (lambda number=number: work.run(number) for number in range(len(work.batches)))
        from_passes(moments, work.parameters, passes, caps)
    else:
        from_choices(
            moments,
            work.experts,
            work.parameters,
            all_given(work),
            caps[0],
            last=observed.last,
            all_experts=settings.all_experts,
            gate_weighted=settings.gate_weighted,
        )
    give_back()
    for place in todo:
        stack, hessian_GNN, counts_G = observed.stacks[place], moments.hessians[place], moments.counts[place]
        if not hessian_GNN.isfinite().all():
            raise overflow(work.replay, work.index)
        weight_GRN = stack.gather(work.parameters, start, min(stop, stack.experts))
        require_finite(work.replay, weight_GRN, stack.names if stack.stacked else stack.names[start:stop])
        cold_G = counts_G < settings.min_tokens
        hessian_GNN[cold_G.to(hessian_GNN.device)] = 0
        piece = work.method.quantise(weight_GRN, None if cold_G.all() else hessian_GNN, counts_G)
        write_tree(work.file(f"piece-{place}", start), {"piece": piece, "looked_at": counts_G, "cold": cold_G})
        del weight_GRN, piece
        give_back()


def _put(work: LayerWork, observed: Observed, starts: range) -> tuple[dict[str, Any], list[MatrixReport]]:
    """Set the experts' matrices to what the files decode to."""
    tensors: dict[str, Any] = {}
    found: list[MatrixReport] = []
    for place, (stack, tokens_E) in enumerate(zip(observed.stacks, observed.tokens, strict=True)):
        own = [start for start in starts if start < stack.experts]
        parts = [read_tree(work.file(f"piece-{place}", start)) for start in own]
        for start, part in zip(own, parts, strict=True):
            for number in range(len(part["cold"])):  # all at once, in float32, would be more than the layer itself
                stack.scatter(work.parameters, start + number, work.method.dense(_one(part["piece"], number)))
        if work.ranks.rank:
            continue
        piece = {key: torch.cat([part["piece"][key] for part in parts]) for key in parts[0]["piece"]}
        looked_at, cold = (torch.cat([part[key] for part in parts]) for key in ("looked_at", "cold"))
        bits: list[float] = []
        for number, name in enumerate(stack.names):
            one = piece if stack.stacked else _one(piece, number)
            stored = work.method.store(name, one, transposed=stack.transposed, stacked=stack.stacked)
            bits += stored_bits(stored, stack.experts if stack.stacked else 1)
            tensors |= stored
        found += matrix_reports(stack.names, (stack.outputs, stack.inputs), tokens_E, looked_at, cold, piece, bits)
    return tensors, found


def _one(piece: Piece, number: int) -> Piece:
    """That of one matrix."""
    return {key: value[number : number + 1] for key, value in piece.items()}
