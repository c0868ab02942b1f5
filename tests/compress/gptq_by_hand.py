"""GPTQ as arXiv 2210.17323 states it before it is made fast, one row and one column after another in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def damped(hessian_NN: np.ndarray, damping: float) -> np.ndarray:
    """The Hessian that is solved with."""
    hessian_NN = np.asarray(hessian_NN, np.float64)
    return hessian_NN + damping * hessian_NN.diagonal().mean() * np.eye(len(hessian_NN))


def quantise(
    weight_RN: np.ndarray, hessian_NN: np.ndarray, to_value: Callable[[float, int, int], float]
) -> tuple[np.ndarray, np.ndarray]:
    """What weights become, and what they were when they were rounded.

    Equations (2) and (3): a column is rounded, all columns that are left move by what is best for the inputs, and the
    inverse of their Hessian follows from that before by one step of Gaussian elimination.

    Args:
        weight_RN: a matrix.
        hessian_NN: damped.
        to_value: rounds a weight, given its row and column.
    """
    rounded_RN, moved_RN = np.zeros(weight_RN.shape), np.array(weight_RN, np.float64)
    for row in range(len(weight_RN)):
        inverse = np.linalg.inv(hessian_NN)
        for column in range(weight_RN.shape[1]):
            rounded_RN[row, column] = to_value(moved_RN[row, column], row, column)
            off = (moved_RN[row, column] - rounded_RN[row, column]) / inverse[0, 0]
            moved_RN[row, column + 1 :] -= off * inverse[0, 1:]
            inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return rounded_RN, moved_RN


def inputs(tokens: int, width: int, decay: float, seed: int) -> np.ndarray:
    """Correlated inputs, [tokens, width]: normal, the i-th eigenvalue of their covariance i^-decay, turned randomly."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))
    return (rng.standard_normal((tokens, width)) * np.arange(1, width + 1) ** (-decay / 2)) @ turn.T


def hessian(tokens: int, width: int, decay: float, seed: int) -> np.ndarray:
    """Second moments of such inputs."""
    input_TN = inputs(tokens, width, decay, seed)
    return input_TN.T @ input_TN / tokens


def error(weight_RN: np.ndarray, dense_RN: np.ndarray, hessian_NN: np.ndarray) -> float:
    """The sum over inputs of ||(W - Q) x||^2, relative to that of ||W x||^2, in float64."""
    weight_RN, dense_RN, hessian_NN = (np.asarray(part, np.float64) for part in (weight_RN, dense_RN, hessian_NN))
    lost, whole = (np.sum(part @ hessian_NN * part) for part in (weight_RN - dense_RN, weight_RN))
    return float(lost / whole)
