"""What a model loses without some of its experts: its held-out loss, measured again with a mask.

    kept:r      only the r experts with the highest weights of each token: are few enough? (MoE-Lens, arXiv 2603.05806)
    removed:r   the r that it chose with the highest logits are masked, and the router chooses again among the rest:
                are others as good? (DeepSeekMoE, arXiv 2401.06066, figure 4)
    named       these experts of these layers are masked for every token, and the router chooses among the rest

What `kept` drops has the weight zero. Where a family's weights have one sum for all tokens, as the unmasked run shows,
those that are kept are scaled to that sum, as the family itself would; elsewhere they stay what they were. The other
two change the router's logits to minus infinity where they leave its first matrix product, before softmax or sigmoid,
so that biases, groups and normalisation are the family's own.

A trace alone gives an estimate: the share of the weights that the first r experts hold (`held`). It knows nothing of
how long the experts' outputs are, nor whether they agree.

Legend: K experts per token, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moectl.bootstrap import Interval, interval, resampled_sums
from moectl.errors import UsageError
from moectl.routing.masking import Mask, Usual, masked, watched
from moectl.routing.tap import Tap
from moectl.traces.trace import RoutingTrace

_MOST_EXPERTS = 1 << 20
"""PEER (arXiv 2407.04153) has a million; a range beyond it is cut, and its last expert is in no model."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """A model's loss under a mask.

    Attributes:
        mask: which.
        loss: nats per token.
        change: how much more than without the mask.
        change_interval: 95 %, by resampling documents, paired with the unmasked run.
        scaled: labels of the layers whose kept weights were scaled to one sum.
    """

    mask: Mask
    loss: float
    change: float
    change_interval: Interval
    scaled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """The estimate from a trace: `share_K` of the weights are held by the first 1, 2, ... K experts, on average."""

    label: str
    share_K: np.ndarray


def parse(text: str) -> Mask:
    """A mask from `kept:R`, `removed:R`, or `LAYER:EXPERT` with commas (`3:17,3:20,5:4-7`, `encoder 1:0`).

    Raises:
        UsageError: it is none of these.
    """
    named: dict[str, set[int]] = {}
    try:
        for part in text.split(","):
            layer, _, experts = part.strip().rpartition(":")
            first, _, last = experts.partition("-")
            numbers = range(int(first), min(int(last or first), _MOST_EXPERTS) + 1)
            if not numbers or numbers[0] < 0 or not layer:
                raise ValueError
            if layer in ("kept", "removed"):
                if text.strip() != part.strip() or len(numbers) > 1 or numbers[0] < 1:
                    raise ValueError
                return Mask(layer, numbers[0])
            named.setdefault(layer, set()).update(numbers)
    except ValueError:
        raise UsageError(
            f"{text!r} is no mask of experts.",
            "It is kept:R, removed:R, or layers and experts as 3:17,3:20,5:4-7.",
            "Correct it.",
        ) from None
    return Mask("named", named={layer: frozenset(experts) for layer, experts in named.items()})


def held(trace: RoutingTrace) -> list[Held]:
    """The share of its weights that each token's r heaviest experts hold, averaged over tokens, at every point."""
    result = []
    for routed in trace.layers:
        if routed.weight_TK is not None and len(trace):
            weight_TK = -np.sort(-np.abs(routed.weight_TK.astype(np.float64)), axis=1)
            total_T = weight_TK.sum(1)
            share_TK = weight_TK[total_T > 0].cumsum(1) / total_T[total_T > 0, None]
            result.append(Held(routed.point.label, share_TK.mean(0) if len(share_TK) else np.zeros(weight_TK.shape[1])))
    return result


def reruns(
    taps: Sequence[Tap], masks: Sequence[Mask], measure: Callable[[], Sequence[np.ndarray]], seed: int = 0
) -> tuple[float, list[Rerun]]:
    """The loss without a mask, and with each.

    `measure` runs the model and gives the log-probabilities of the tokens of each document; it is called once more than
    there are masks.

    Raises:
        InputError: the experts are not called with an index and weights, the router's logits are not seen, or it chose
            a masked expert all the same.
        UsageError: a mask leaves a token fewer experts than it needs, or names layers that are not there.
    """
    usual: dict[str, Usual] = {}
    with watched(taps, usual):
        base = measure()
    tokens = np.array([len(document) for document in base], np.float64)
    losses = [np.array([-document.sum() for document in base])]
    for mask in masks:
        _check(taps, mask, usual)
        with masked(taps, mask, usual):
            losses.append(np.array([-document.sum() for document in measure()]))
    sums_R = resampled_sums(np.stack([tokens, *losses]), seed)
    loss = [float(each.sum() / tokens.sum()) for each in losses]
    scaled = tuple(tap.point.label for tap in taps if usual[tap.point.name].one_sum)
    found = []
    for number, mask in enumerate(masks, 1):
        change = interval((sums_R[:, number + 1] - sums_R[:, 1]) / sums_R[:, 0])
        found.append(Rerun(mask, loss[number], loss[number] - loss[0], change, scaled if mask.kind == "kept" else ()))
    return loss[0], found


def _check(taps: Sequence[Tap], mask: Mask, usual: Mapping[str, Usual]) -> None:
    """That a mask leaves every token what it needs, before anything is run."""
    points = {tap.point.label: tap.point for tap in taps}
    for label, experts in mask.named.items():
        if label not in points or max(experts) >= points[label].num_experts:
            raise UsageError(
                f"The mask {mask.label} names expert {max(experts)} of layer {label}.",
                f"Layers with experts are {', '.join(points)}; each has {max(p.num_experts for p in points.values())}.",
                "Correct the layer or the expert.",
            )
    for label, point in points.items():
        top_k = usual[point.name].top_k
        gone = mask.r or len(mask.named.get(label, ()))
        if mask.r > top_k or (mask.kind != "kept" and gone > point.num_experts - top_k):
            raise UsageError(
                f"The mask {mask.label} leaves too few experts at layer {label}.",
                f"A token has {top_k} of {point.num_experts}.",
                "Keep or remove fewer.",
            )
