"""ScatterMoE (arXiv 2403.08245), github.com/shawntan/scattermoe. Written from documentation, not run."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from moectl.bench.inputs import Weights
from moectl.bench.peers import Layer, need_cuda


def build(weights: Weights) -> Layer:
    """`parallel_linear` twice, as its GLUMLP does, with the gate rows first."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # type: ignore[import-not-found]

    need_cuda(weights)
    gate_up, down, shape = weights.gate_up_EGD, weights.down_EDF, weights.shape

    def call(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        plan = flatten_sort_count(index_TK, shape.num_experts)
        h = parallel_linear(x_TD, gate_up.permute(0, 2, 1), shape.top_k, *plan, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        out: Tensor = parallel_linear(
            functional.silu(gate) * up, down.permute(0, 2, 1), 1, *plan, grouped_in=True, gates=weight_TK
        )
        return out

    return Layer(call, (gate_up, down), block_m=lambda _rows: 128)
