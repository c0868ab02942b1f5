"""Choices among the tokens of one sequence, for all sequences at once. Legend: T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(sequence_T: Tensor | None, like_T: Tensor) -> Tensor:
    """How many tokens the sequence of each token has, int64 [T]; without sequences, all of them."""
    if sequence_T is None:
        return torch.full_like(like_T, len(like_T), dtype=torch.int64)
    return sequence_T.bincount()[sequence_T]


def ranks(value_T: Tensor, sequence_T: Tensor | None) -> Tensor:
    """The place of each token among those of its sequence by falling value, from 0, the earlier first among equals."""
    order_T = value_T.argsort(descending=True, stable=True)
    place_T = torch.arange(len(value_T), device=value_T.device)
    if sequence_T is not None:
        order_T = order_T[sequence_T[order_T].argsort(stable=True)]
        sorted_T = sequence_T[order_T]
        place_T = place_T - torch.searchsorted(sorted_T, sorted_T)
    return torch.empty_like(place_T).scatter(0, order_T, place_T)
