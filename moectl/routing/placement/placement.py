"""A placement of the experts of one layer, and what it makes of their loads.

Legend: E experts, S slots (each holds a copy of an expert), G GPUs, X loads that are looked at together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the experts of one layer are.

    Attributes:
        expert_S: the expert in each slot; every expert stands in one at least.
        gpu_S: the GPU that each slot is on, never falling.
        num_experts, gpus: how many there are.
    """

    expert_S: np.ndarray
    gpu_S: np.ndarray
    num_experts: int
    gpus: int

    @property
    def copies_E(self) -> np.ndarray:
        """In how many slots each expert is [E]."""
        return np.bincount(self.expert_S, minlength=self.num_experts)

    @property
    def share_EG(self) -> np.ndarray:
        """Which share of each expert's tokens each GPU computes: copies share evenly, rows sum to 1 [E, G]."""
        count_EG = np.zeros((self.num_experts, self.gpus))
        np.add.at(count_EG, (self.expert_S, self.gpu_S), 1.0)
        return count_EG / self.copies_E[:, None]


def gpu_loads(placement: Placement, load_XE: np.ndarray) -> np.ndarray:
    """What the GPUs compute of loads of the experts [..., E], in the same unit [..., G]."""
    return np.asarray(load_XE @ placement.share_EG)


def imbalance(load_XG: np.ndarray) -> np.ndarray:
    """The largest load of a GPU over the mean, by which a layer that waits for all is slower [...]; 1 without load."""
    mean_X = load_XG.mean(-1)
    return np.where(mean_X > 0, load_XG.max(-1) / np.where(mean_X > 0, mean_X, 1.0), 1.0)


def least_imbalance(load_XE: np.ndarray, gpus: int) -> np.ndarray:
    """What no placement that has each expert once can go below: some GPU has all of the busiest expert [...]."""
    total_X = load_XE.sum(-1)
    busiest_X = load_XE.max(-1) / np.where(total_X > 0, total_X, 1)
    return np.maximum(1.0, busiest_X * gpus)


def fair_loads(tokens: int, num_experts: int, top_k: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Loads of the experts where every token draws `top_k` different ones by a fair lot [draws, E].

    They are multinomial with deviations shrunk by (E - k) / (E - 1): the mean and the covariance of drawing without
    putting back, in time that does not depend on the tokens.
    """
    even = np.full(num_experts, 1 / num_experts)
    mean = tokens * top_k / num_experts
    drawn_XE = generator.multinomial(tokens * top_k, even, size=draws)
    return np.asarray(mean + (drawn_XE - mean) * np.sqrt((num_experts - top_k) / max(num_experts - 1, 1)))
