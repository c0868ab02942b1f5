"""What routers draw in training: jitter on their input, Gumbel noise, uniform numbers.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moectl.routers.protocol import Context, wide


def jittered(hidden_TD: Tensor, jitter: float, context: Context) -> Tensor:
    """In training the input times U(1 - jitter, 1 + jitter) for each element (arXiv 2101.03961); float32 or wider."""
    hidden_TD = wide(hidden_TD)
    if not context.training or not jitter:
        return hidden_TD
    return hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - jitter, 1 + jitter, generator=context.generator)


def gumbel_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape, dtype and device of `scores`: argmax of logits + noise is a softmax draw."""
    return -torch.empty_like(scores).exponential_(generator=generator).log()


def uniform(shape: Sequence[int], like: Tensor, context: Context) -> Tensor:
    """Numbers in [0, 1), of the type and on the device of `like`."""
    return like.new_empty(shape).uniform_(generator=context.generator)
