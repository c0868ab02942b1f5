"""Routed experts made from one dense FFN: copied, shuffled, cut, scaled, partly drawn anew, with noise.

Legend: E experts, G granularity, so E / G copies of the FFN, each cut into G experts of width F / G.
"""

from __future__ import annotations

import math

from moectl.checkpoint.expressions import Expression, Index, Init, Noise, Redraw, Scale, Shuffle, Slice
from moectl.families.spec import Ffn
from moectl.upcycle.recipe import SparseRecipe

Factors = tuple[float, float, float]


def routed_experts(ffn: Ffn, width: int, recipe: SparseRecipe, key: str, scale: float = 1.0) -> tuple[Ffn, ...]:
    """The E experts of a layer: expert c * G + g is part g of copy c (virtual groups, arXiv 2410.07524, section 3.2).

    Args:
        width: the FFN's intermediate size F, a multiple of G.
        key: the layer's place; draws are keyed by it, the expert's number and the matrix.
        scale: what outputs are multiplied by, on top of what the cut asks for.
    """
    part = width // recipe.granularity
    gate_factor, up_factor, down_factor = scale_factors(recipe.granularity, recipe.scale)
    factors = gate_factor, up_factor, down_factor * scale
    experts = []
    for number in range(recipe.experts):
        copy, group = divmod(number, recipe.granularity)
        whole = _shuffled(ffn, f"{key}.copies.{copy}") if recipe.shuffle else ffn
        expert = _scaled(_part(whole, group * part, (group + 1) * part, width), factors)
        experts.append(_varied(expert, recipe, f"{key}.experts.{number}"))
    return tuple(experts)


def router_rows(hidden_size: int, recipe: SparseRecipe, key: str) -> Expression:
    """The router [E, H]: one normal row per copy of the FFN, the same for all its parts, so that they go together."""
    assert recipe.router_std is not None, "the plan fills in the family's own"
    rows = Init((recipe.copies, hidden_size), recipe.router_std, f"{key}.router")
    if recipe.granularity == 1:
        return rows
    return Index(rows, 0, tuple(number // recipe.granularity for number in range(recipe.experts)))


def scale_factors(granularity: int, scale: str) -> Factors:
    """What gate, up and down are multiplied by so that G parts of a copy, weighted 1/G of it each, sum to it again.

    A token sent to whole copies gives every part of copy c the weight w_c / G, the w_c summing to 1, so unscaled the
    output is the dense one divided by G, whatever the router says.

    auto: powers of two on up and down where G is one (exact in every dtype, and spread), else as `updown`.
    updown: sqrt(G) on up and down. down: G on down. Both exact but for rounding.
    cbrt: G^(1/3) on all three, as Megatron-Core does; not the dense function, since the gate is not linear.
    none: no scaling.
    """
    if granularity == 1 or scale == "none":
        return 1.0, 1.0, 1.0
    if scale == "down":
        return 1.0, 1.0, float(granularity)
    if scale == "cbrt":
        factor = granularity ** (1 / 3)
        return factor, factor, factor
    power = granularity.bit_length() - 1
    if scale == "auto" and granularity == 1 << power:
        return 1.0, float(1 << power // 2), float(1 << power - power // 2)
    root = math.sqrt(granularity)
    return 1.0, root, root


def scaled(ffn: Ffn, factor: float) -> Ffn:
    """The FFN with its output times `factor`, by its down matrix alone (exact for powers of two)."""
    return _scaled(ffn, (1.0, 1.0, factor))


def _part(ffn: Ffn, start: int, stop: int, width: int) -> Ffn:
    if (start, stop) == (0, width):
        return ffn
    return Ffn(Slice(ffn.gate, 0, start, stop), Slice(ffn.up, 0, start, stop), Slice(ffn.down, 1, start, stop))


def _shuffled(ffn: Ffn, key: str) -> Ffn:
    return Ffn(Shuffle(ffn.gate, 0, key), Shuffle(ffn.up, 0, key), Shuffle(ffn.down, 1, key))


def _scaled(ffn: Ffn, factors: Factors) -> Ffn:
    gate, up, down = (x if f == 1.0 else Scale(x, f) for x, f in zip(ffn.parts, factors, strict=True))
    return Ffn(gate, up, down)


def _varied(ffn: Ffn, recipe: SparseRecipe, key: str) -> Ffn:
    """The expert's own deviation from the copy: neurons dropped (one set for its matrices), weights redrawn, noise."""

    def varied(x: Expression, matrix: str, neurons: int) -> Expression:
        place = f"{key}.{matrix}"
        if recipe.drop:
            x = Redraw(x, recipe.drop, f"{place}/drop", dim=neurons, choice=f"{key}/drop")
        if recipe.reinit:
            x = Redraw(x, recipe.reinit, f"{place}/reinit")
        return Noise(x, recipe.noise, place) if recipe.noise else x

    return Ffn(varied(ffn.gate, "gate", 0), varied(ffn.up, "up", 0), varied(ffn.down, "down", 1))
