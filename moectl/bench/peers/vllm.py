"""vLLM's fused experts (Triton), forward only. Written from documentation, not run."""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """`fused_experts`; its weights are w1 [E, 2F, D], gate first, and w2 [E, D, F]; weights float32, ids int32."""
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    need_cuda(weights)
    w1, w2 = weights.gate_up_EGD.detach(), weights.down_EDF.detach()

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out: Tensor = fused_experts(
            hidden_states=x_TD, w1=w1, w2=w2, topk_weights=weight_TK.to(torch.float32), topk_ids=index_TK.int()
        )
        return out

    return Layer(call)
