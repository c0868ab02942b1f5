"""Labels that tokens carry: their checks, means over the tokens of one label, and matrices of their own for each.

Legend: T tokens, R tokens of one label, D hidden, O outputs, E experts, Z labels (tasks, domains, modalities).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def labelled(label_T: Tensor | None, number: int, what: str) -> Tensor:
    """The labels, once they are seen to be there and in range.

    Raises:
        ValueError: there are none, or one is not in [0, number).
    """
    if label_T is None:
        raise ValueError(f"this router goes by the {what} of each token, and none is given")
    for label in (int(label_T.min()), int(label_T.max())) if label_T.numel() else ():
        if not 0 <= label < number:
            raise ValueError(f"a {what} is {label}, of {number}")
    return label_T


def rows(label_T: Tensor, number: int) -> Iterator[tuple[int, Tensor]]:
    """Each label that occurs, and the tokens that carry it."""
    for label in range(number):
        row_R = (label_T == label).nonzero()[:, 0]
        if len(row_R):
            yield label, row_R


def means(value_TE: Tensor, label_T: Tensor) -> Tensor:
    """For each token the mean over all tokens of its label [T, E]."""
    number = int(label_T.max()) + 1 if len(label_T) else 0
    total_ZE = value_TE.new_zeros(number, value_TE.shape[1]).index_add(0, label_T, value_TE)
    count_Z = torch.bincount(label_T, minlength=number).clamp(min=1)
    return (total_ZE / count_Z[:, None])[label_T]


def linear(x_TD: Tensor, weight_ZOD: Tensor, label_T: Tensor) -> Tensor:
    """Each token through the matrix of its own label [T, O]."""
    y_TO = x_TD.new_zeros(len(x_TD), weight_ZOD.shape[1])
    for label, row_R in rows(label_T, len(weight_ZOD)):
        y_TO = y_TO.index_copy(0, row_R, torch.nn.functional.linear(x_TD[row_R], weight_ZOD[label]))
    return y_TO
