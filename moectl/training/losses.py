"""What a router is taught beside the language model's loss: to spread its tokens, and to keep its logits small.

Shapes: T tokens, E experts. Everything is computed in float32, whatever autocast says, or wider if the input is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(logits_TE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e of one layer: f the share of assignments, P the mean probability; 1 at perfect balance.

    P is the softmax over *all* experts. A softmax over the chosen ones alone has the constant mean 1/K, and no
    gradient (the released code of arXiv 2401.02731 does that). f is counted, and only P is differentiated. Switch
    Transformer (arXiv 2101.03961, eq. 4-6) with f over all K choices, as in GShard (arXiv 2006.16668).

    Args:
        load_E: how many assignments each expert received; it may be counted over more tokens than `logits_TE` has
            (arXiv 2501.11873), and then the mean of this loss over the pieces of a batch is the loss of the batch.
    """
    load_E = load_E.to(_wide(logits_TE))
    share_E = load_E / load_E.sum()
    probability_E = logits_TE.to(share_E.dtype).softmax(-1).mean(0)
    return len(load_E) * torch.dot(share_E.detach(), probability_E)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp of one layer's router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.to(_wide(logits_TE)).logsumexp(-1).square().mean()


def selection_bias_step(load_E: Tensor, rate: float) -> Tensor:
    """What is added to the biases by which experts are selected: +rate where too few tokens went, -rate where too many.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664): no gradient is involved.
    """
    load_E = load_E.double()
    return (rate * torch.sign(load_E.mean() - load_E)).float()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
