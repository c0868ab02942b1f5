"""The 1991 loss: its value, and the competition that its gradient is."""

from __future__ import annotations

import numpy as np
import torch

from moectl.routers.adaptive_mixtures import mixture_loss

DRAW = torch.Generator().manual_seed(0)
LOGITS_TE = torch.randn(5, 3, dtype=torch.float64, generator=DRAW)
OUTPUT_TED = torch.randn(5, 3, 4, dtype=torch.float64, generator=DRAW)
TARGET_T1D = torch.randn(5, 1, 4, dtype=torch.float64, generator=DRAW)


def test_loss_is_the_likelihood_of_a_mixture_of_gaussians() -> None:
    error_TE = (TARGET_T1D - OUTPUT_TED).square().sum(-1)
    per_token = []
    for logits, errors in zip(LOGITS_TE.numpy(), error_TE.numpy(), strict=True):
        p = np.exp(logits) / np.exp(logits).sum()
        per_token.append(-np.log(sum(p[i] * np.exp(-errors[i] / 2) for i in range(3))))
    assert abs(float(mixture_loss(LOGITS_TE, error_TE)) - np.mean(per_token)) < 1e-12


def test_an_expert_is_pulled_by_its_own_residual_over_its_posterior() -> None:
    output_TED = OUTPUT_TED.clone().requires_grad_()
    mixture_loss(LOGITS_TE, (TARGET_T1D - output_TED).square().sum(-1)).backward()
    posterior_TE = (LOGITS_TE - (TARGET_T1D - OUTPUT_TED).square().sum(-1) / 2).softmax(-1)
    wanted_TED = -posterior_TE[..., None] * (TARGET_T1D - OUTPUT_TED) / 5
    torch.testing.assert_close(output_TED.grad, wanted_TED)
