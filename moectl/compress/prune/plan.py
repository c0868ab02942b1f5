"""Expert pruning: fewer experts in every layer, everything else as it was. An ordinary, smaller checkpoint.

What is left of a layer computes what the whole layer would if its router could not choose the experts that went: their
rows are gone from the router, so a softmax is over the others, and what is renormalised is so over the others too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moectl.checkpoint.expressions import Concat, Copy, Expression, Index, Slice
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.card import prune_card
from moectl.compress.prune.families import PRUNABLE
from moectl.compress.prune.layout import COUNTS, Layout
from moectl.compress.prune.recipe import PruneRecipe
from moectl.compress.prune.scores import Scores, choose
from moectl.families.components import PER_EXPERT

_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def plan_prune(layout: Layout, recipe: PruneRecipe, scores: Scores | None) -> Plan:
    """The plan of a checkpoint with as many experts as the recipe keeps. Reads no weights.

    Args:
        scores: how much experts matter; needed unless all are kept.

    Raises:
        UsageError: so many cannot be kept.
        InputError: the scores do not tell the experts apart.
    """
    source, count = layout.source, recipe.kept(layout)
    if count == layout.experts:
        kept = {layer: tuple(range(layout.experts)) for layer in layout.layers}
    else:
        assert scores is not None
        kept = choose(layout, scores, recipe.method, count)
    tensors = tuple(_tensors(layout, kept))
    recorded = {
        "method": "prune",
        "saliency": recipe.method,
        "experts": layout.experts,
        "keep": count,
        "scores": {"sha256": scores.sha256, **scores.about} if scores else None,
        "kept": {str(layer): list(experts) for layer, experts in kept.items()},
    }
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    per_expert = layout.expert_parameters
    facts = {
        "family": source.model_type,
        "source_family": source.model_type,
        "source_parameters": sum(math.prod(ref.shape) for ref in source.tensors.values()),
        "source_bytes": source.nbytes,
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "parameters": parameters,
        "active_parameters": parameters - (count - layout.top_k) * per_expert,
        "dequantised": None,
        "exact": count == layout.experts and not layout.extra,
        "experts": count,
        "source_experts": layout.experts,
        "top_k": layout.top_k,
    }
    return Plan(
        sources=(source,),
        tensors=tensors,
        recipe=recorded,
        config=_config(source, count, dropped_mtp=bool(layout.extra)),
        shard_bytes=recipe.shard_bytes,
        files={"README.md": prune_card(source, recorded, facts)},
        facts=facts,
    )


def _tensors(layout: Layout, kept: Mapping[int, tuple[int, ...]]) -> Iterator[OutputTensor]:
    """Every tensor that stays, in the source's order; experts are numbered anew, in their order."""
    for name in layout.source.tensors:
        expression: Expression = Copy(name)
        if name in layout.extra:
            continue
        if name in layout.numbered:
            layer, expert = layout.numbered[name]
            if expert not in kept[layer]:
                continue
            name = renumbered(name, kept[layer].index(expert))
        elif name in layout.sliced:
            layer, dim = layout.sliced[name]
            if dim == 0:  # as ranges of the source's bytes, which are moved and never computed with
                expression = Concat(tuple(Slice(expression, 0, each, each + 1) for each in kept[layer]), 0)
            else:
                expression = Index(expression, dim, kept[layer])
        yield planned(name, expression, (layout.source,))


def renumbered(name: str, expert: int) -> str:
    """The name of an expert's tensor with another number in it."""
    found = PER_EXPERT.fullmatch(name)
    assert found is not None
    return name[: found.start("expert")] + str(expert) + name[found.end("expert") :]


def _config(source: Checkpoint, experts: int, *, dropped_mtp: bool) -> dict[str, Any]:
    there = [field for field in COUNTS if field in source.config] or [PRUNABLE[source.model_type]]
    config = {**source.config, **dict.fromkeys(there, experts)}
    if dropped_mtp:
        config |= {field: 0 for field in _MTP_COUNTS if field in config}
    return config
