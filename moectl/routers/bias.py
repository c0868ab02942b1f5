"""Biases of the selection, which steer the load and carry no gradient.

Legend: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_towards_mean(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """b += rate * sign(mean load - load), in place (arXiv 2408.15664, algorithm 1; 2412.19437, section 2.1.2)."""
    load_E = load_E.double()
    bias_E += (rate * (load_E.mean() - load_E).sign()).to(bias_E).view_as(bias_E)
