"""The self-check: what one short forward pass says of the taps before any number is taken from them.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.routing.capture import Capture, Seen
from moectl.routing.tap import Tap
from moectl.text import escape
from moectl.traces.trace import NO_EXPERT, Point

_NEAR = 0.02
"""How far weights may be, relatively, from what a scoring function makes of the scores: bfloat16 rounds by 0.004."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The taps with all that the forward pass has shown of them, and what a reader of the numbers has to know."""

    taps: tuple[Tap, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def check(model: nn.Module, run: Callable[[], Tensor]) -> Checked:
    """Run a few tokens without and with hooks; `run` is a forward pass and returns its output.

    Raises:
        InputError: a tap was not called once, an expert's number is out of range, scores are no numbers, or the hooks
            change the output.
    """
    plain = run()
    with Capture(model) as capture:
        watched = run()
        checked = complete(capture.taps, capture.take())
    if _same(plain, watched):
        return checked
    if _same(plain, run()):
        raise InputError(
            f"{type(model).__name__} gives another output while its routing is watched.",
            "What is seen would not be what it does otherwise.",
            "This is a bug in moectl or in an adapter: please report it with the model's config.json.",
        )
    return replace(checked, notes=(*checked.notes, "The model's output differs from run to run on this device."))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def complete(taps: Sequence[Tap], seen: Sequence[Seen]) -> Checked:
    """The taps with their number of experts per token, how scores become weights, and whether scores alone decide.

    Raises:
        InputError: an expert's number is out of range, or scores are no numbers.
    """
    completed, alone, notes = [], [], dict.fromkeys(f"{_class_of(tap)}: {tap.warning}." for tap in taps if tap.warning)
    for tap, each in zip(taps, seen, strict=True):
        point = replace(tap.point, top_k=each.index_TK.shape[-1])
        if each.score_TE is None:
            _check_range(point, each.index_TK)
            if tap.scores is not None:
                notes[f"{escape(point.name)}: its router was not seen to give scores, so there are none."] = None
                point = replace(point, score_kind="none", selects=False)
            completed.append(replace(tap, point=point, scores=None))
            continue
        refuse_non_finite(point, each.score_TE)
        score_TE = each.score_TE.float()
        point = replace(point, num_experts=max(point.num_experts, score_TE.shape[-1]))
        _check_range(point, each.index_TK)
        share, exact = _decided_by_scores(each.index_TK, score_TE)
        if point.selects and not exact:
            notes[
                f"{escape(point.name)}: only {share:.1%} of the experts chosen are the top {point.top_k} of the "
                "router's scores, and no bias or group is known that would explain it."
            ] = None
        if not point.selects:
            alone.append(share)
        point = replace(
            point,
            selects=point.selects and exact,
            scoring=_scoring(point, each, score_TE) if point.score_kind == "logits" else point.scoring,
        )
        ordered = tap.ordered or (point.selects and _falls(each.index_TK, score_TE))
        completed.append(replace(tap, point=point, ordered=ordered))
    if alone:
        notes[
            "Biases or groups choose beside the scores: the scores alone would have chosen "
            f"{sum(alone) / len(alone):.0%} of the same experts ({min(alone):.0%} in the layer with the least)."
        ] = None
    return Checked(tuple(completed), tuple(notes))


def refuse_non_finite(point: Point, score_TE: Tensor) -> None:
    """Raise InputError if a score is NaN or infinite."""
    finite_T = torch.isfinite(score_TE).all(-1)
    if not finite_T.all():
        raise InputError(
            f"{escape(point.name)}: the router's scores hold NaN or infinity, first in row "
            f"{int(finite_T.int().argmin())} of {len(finite_T)}.",
            "What it chose means nothing.",
            "Check the model's weights, or run it in float32.",
        )


def _class_of(tap: Tap) -> str:
    """The class of what is watched."""
    return type(tap.experts or tap.router).__name__


def _check_range(point: Point, index_TK: Tensor) -> None:
    low, high = int(index_TK.min()), int(index_TK.max())
    if low < NO_EXPERT or high >= point.num_experts:
        raise InputError(
            f"{escape(point.name)} names expert {low if low < NO_EXPERT else high}, of {point.num_experts}.",
            "The numbers are not those of experts, so counting them would mean nothing.",
            "Give an adapter (an entry point of the group `moectl.routing_adapters`).",
        )


def _decided_by_scores(index_TK: Tensor, score_TE: Tensor) -> tuple[float, bool]:
    """Which share of the chosen experts are in the top-k of the scores, and whether all are, ties aside."""
    kept_T = (index_TK != NO_EXPERT).all(-1)
    index_TK, score_TE = index_TK[kept_T], score_TE[kept_T]
    top_k = index_TK.shape[-1]
    least_T1 = score_TE.topk(top_k, dim=-1).values[:, -1:]
    in_top_TK = score_TE.gather(-1, index_TK) >= least_T1
    return float(in_top_TK.float().mean()) if len(in_top_TK) else 1.0, bool(in_top_TK.all())


def _scoring(point: Point, seen: Seen, score_TE: Tensor) -> str:
    """`softmax` or `sigmoid`: what the weights are in proportion to, over the chosen or, of one, over the tokens."""
    kept_T = (seen.index_TK != NO_EXPERT).all(-1)
    index_TK, weight_TK, score_TE = seen.index_TK[kept_T], seen.weight_TK[kept_T].float(), score_TE[kept_T]
    errors = {}
    for name, p_TE in (("softmax", score_TE.softmax(-1)), ("sigmoid", score_TE.sigmoid())):
        ratio_TK = weight_TK / p_TE.gather(-1, index_TK).clamp(min=1e-30)
        mean = ratio_TK.mean(-1, keepdim=True) if point.top_k > 1 else ratio_TK.mean()
        errors[name] = float((ratio_TK / mean - 1).abs().mean())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < _NEAR else point.scoring


def _falls(index_TK: Tensor, score_TE: Tensor) -> bool:
    """Whether every token's experts come in the order of falling scores."""
    chosen_TK = score_TE.gather(-1, index_TK.clamp(min=0))
    return bool((chosen_TK[:, :-1] >= chosen_TK[:, 1:]).all())
