"""Branch-Train-Merge's ensemble of whole models (arXiv 2208.03306, section 3.1): p(x_t) = sum_j w_j p_j(x_t).

Only the probabilities that each model gave to the tokens that came are needed, so the models need never be in memory
together. Legend: J models, N tokens of a document.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Weights = Literal["uniform", "posterior"]


def ensemble_log_probabilities(log_p_JN: np.ndarray, weights: Weights) -> np.ndarray:
    """The log-probability [N] the ensemble gives to each token of a document, in nats.

    Args:
        log_p_JN: what each model gave to it, in nats, given all tokens before it.
        weights: uniform, 1/J throughout; or posterior, by Bayes' rule from a uniform prior over the models and the
            tokens of the document so far: w_j(t) is proportional to the product of p_j(x_s) over s < t.
    """
    weight_JN = np.zeros_like(log_p_JN)
    if weights == "posterior":
        weight_JN[:, 1:] = np.cumsum(log_p_JN, axis=1)[:, :-1]
    return _log_sum(log_p_JN + weight_JN) - _log_sum(weight_JN)


def _log_sum(x_JN: np.ndarray) -> np.ndarray:
    largest = x_JN.max(axis=0)
    return np.asarray(largest + np.log(np.exp(x_JN - largest).sum(axis=0)))
