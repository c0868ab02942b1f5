"""transformers' rules between names and layouts on disk and in memory, for coded parameters and for decoded ones.

Rules are semi-internal (`core_model_loading`), alike in 5.17 and 5.23. A rule is a pattern that is searched for in
names: what rewrites `experts.gate_up_proj` would rewrite, or worse transpose, `experts.gate_up_proj.codes` too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)


def spare(rule: WeightTransform, names: frozenset[str]) -> None:
    """Have a rule, and the inverse that saving makes of it, pass over some names."""
    kind: Any = type(rule)

    class Sparing(kind):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return (source_key, None) if source_key in names else super().rename_source_key(source_key)

        def reverse_transform(self) -> WeightTransform:
            inverse: WeightTransform = super().reverse_transform()
            spare(inverse, names)
            return inverse

    rule.__class__ = Sparing


def native(model: PreTrainedModel, names: Iterable[str]) -> list[WeightTransform]:
    """The rules by which a plain model saves itself as checkpoints of its family are: all there are, used or not.

    Those that add or take away a prefix are only among them if they serve tensors of the checkpoint it comes from,
    whose `names` are given.
    """
    rules: list[WeightTransform] = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for name in names:
        rename_source_key(name, renamings, converters)
    return [rule for rule in rules if not isinstance(rule, PrefixChange) or rule.was_used()]
