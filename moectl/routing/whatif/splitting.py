"""What the experts of a batch cost where some are on the GPU and the others are fetched or run on the CPU; buffers.

A batch is so many tokens of a document that follow one another; the last of a document may be smaller.
Legend: T tokens, K experts per token, E experts, B batches, N tokens, R requests for experts, one after the other.
"""

from __future__ import annotations

import numpy as np

from moectl.compiled import compiled

FETCHED, ON_CPU, SUM, LONGER = range(4)
"""Columns of `costs`."""


def batches(document_T: np.ndarray, size: int) -> np.ndarray:
    """The number of each token's batch [T], int64, from 0, never falling."""
    start_T = np.append(True, np.diff(document_T) != 0)
    place_T = np.arange(len(document_T)) - np.maximum.accumulate(np.where(start_T, np.arange(len(document_T)), 0))
    return np.cumsum(start_T | (place_T % size == 0)) - 1


def costs(
    key_TK: np.ndarray, batch_T: np.ndarray, pinned_E: np.ndarray, cpu: float, copy: float
) -> tuple[np.ndarray, int, int]:
    """What all batches take at one layer, with experts that are on the GPU at no cost (Fiddler, arXiv 2402.07033).

    An expert that is not there is fetched, which takes `copy`, or run on the CPU, which takes `cpu` for each of its
    tokens. FETCHED: all are fetched. ON_CPU: all are run there. SUM: each does what is shorter, so that the sum of both
    sides is smallest, as src/fiddler/mixtral.py has it. LONGER: the longer of both sides is smallest, as a comment
    there has it: the busiest are fetched, up to where that takes as long as the CPU takes for the others.

    Args:
        key_TK: experts, negative where there is none.
        batch_T: from `batches`.
        pinned_E: which experts are on the GPU.

    Returns:
        The four sums; the experts that batches take, added up; the assignments that SUM leaves to the CPU.
    """
    cost_4, count_2 = np.zeros(4), np.zeros(2, np.int64)
    number_N = np.zeros(int(np.bincount(batch_T).max()) * key_TK.shape[1] + 1, np.int64)
    _costs(key_TK, batch_T, pinned_E, cpu, copy, number_N, cost_4, count_2)
    return cost_4, int(count_2[0]), int(count_2[1])


@compiled
def _costs(
    key_TK: np.ndarray,
    batch_T: np.ndarray,
    pinned_E: np.ndarray,
    cpu: float,
    copy: float,
    number_N: np.ndarray,
    cost_4: np.ndarray,
    count_2: np.ndarray,
) -> None:
    """`number_N` is room, all 0, for how many experts have 0, 1, ... N tokens in a batch."""
    count_E, taken_E = np.zeros(len(pinned_E), np.int64), np.empty(len(pinned_E), np.int64)
    taken = 0
    for token in range(len(key_TK)):
        for key in key_TK[token]:
            if key >= 0:
                if count_E[key] == 0:
                    taken_E[taken] = key
                    taken += 1
                count_E[key] += 1
        if token + 1 < len(key_TK) and batch_T[token + 1] == batch_T[token]:
            continue
        count_2[0] += taken
        missing, assigned, most = 0, 0, 0
        for at in range(taken):
            count = count_E[taken_E[at]]
            count_E[taken_E[at]] = 0
            if not pinned_E[taken_E[at]]:
                number_N[count] += 1
                missing, assigned, most = missing + 1, assigned + count, max(most, count)
                if count * cpu < copy:
                    cost_4[2] += count * cpu
                    count_2[1] += count
                else:
                    cost_4[2] += copy
        cost_4[0] += missing * copy
        cost_4[1] += assigned * cpu
        longer, fetched = assigned * cpu, 0
        for count in range(most, 0, -1):
            while number_N[count]:
                number_N[count] -= 1
                fetched, assigned = fetched + 1, assigned - count
                longer = min(longer, max(fetched * copy, assigned * cpu))
        cost_4[3] += longer
        taken = 0


def serial(key_TK: np.ndarray, batch_T: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts that each batch takes, by rising number, batch after batch [R], int32, and their batches [R]."""
    token_TK = np.broadcast_to(batch_T[:, None], key_TK.shape)
    there_TK = key_TK >= 0
    taken_BE = np.zeros((int(batch_T[-1]) + 1, experts), bool)
    taken_BE[token_TK[there_TK], key_TK[there_TK]] = True
    batch_R, key_R = np.nonzero(taken_BE)
    return key_R.astype(np.int32), batch_R


@compiled
def buffered(key_R: np.ndarray, batch_R: np.ndarray, experts: int, size: int) -> int:
    """How many requests find their expert in a buffer of `size` as arXiv 2303.06182 (VI.B) manages it.

    The experts of a batch run one after the other, by rising number. Those that the batch does not take leave first;
    then the last that came in, so that the first ones are there when the next batch begins. Of several that the batch
    does not take the last that came in leaves too, which the paper leaves open.

    Args:
        key_R, batch_R: as `serial` gives them.
    """
    held, stack_C = 0, np.empty(size, np.int64)
    inside_E, needed_E = np.zeros(experts, np.bool_), np.full(experts, -1, np.int64)
    hits, ahead = 0, 0
    for request in range(len(key_R)):
        key, batch = key_R[request], batch_R[request]
        while ahead < len(key_R) and batch_R[ahead] == batch:
            needed_E[key_R[ahead]] = batch
            ahead += 1
        if inside_E[key]:
            hits += 1
            continue
        if held == size:
            out = held - 1
            for place in range(held - 1, -1, -1):
                if needed_E[stack_C[place]] != batch:
                    out = place
                    break
            inside_E[stack_C[out]] = False
            for place in range(out, held - 1):
                stack_C[place] = stack_C[place + 1]
            held -= 1
        stack_C[held] = key
        inside_E[key] = True
        held += 1
    return hits
