"""Adapters of peers that cannot be installed everywhere, around stand-ins that do what the peers' documentation says.

This shows that our side of an adapter (sorting, gathering, weighting) is right, not that the peers are as documented.
"""

import sys
from types import ModuleType

import pytest
import torch
from small_layer import SMALL
from torch.nn import functional

from moectl.bench import peers
from moectl.bench.accuracy import check
from moectl.bench.inputs import make_batches, make_weights
from moectl.bench.peers import loop
from moectl.bench.routing import make

CPU = torch.device("cpu")


def by_group(x_SK, weight_EKN, sizes):
    parts = x_SK.split([int(size) for size in sizes])
    return torch.cat([part @ weight for part, weight in zip(parts, weight_EKN, strict=True)])


def gmm(a, b, batch_sizes, trans_b=False):
    assert batch_sizes.device == CPU and batch_sizes.dtype == torch.int64
    return by_group(a, b.mT if trans_b else b, batch_sizes)


def matmul(a, b, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None):
    assert bias is None
    a = a if gather_indx is None else a[gather_indx.long()]
    out = by_group(a, b, a_ragged_metadata)
    return out if scatter_indx is None else torch.zeros_like(out).index_copy(0, scatter_indx.long(), out)


class Applied:
    def __init__(self, function):
        self.apply = function


def scatter_rows(x, pos, _local, _world, _batch, _size):
    return x[pos]


def gather_rows(x, pos, _local, _world, batch, _size):
    return x.new_zeros(batch, x.shape[1]).index_copy(0, pos, x)


class Dispatcher:
    def __init__(self, experts, _capacity, width, _dtype):
        self.experts, self.width = experts, width

    def update(self, indices, locations, gates, capacity):
        self.places = [i * capacity + at for i, at in zip(indices, locations, strict=True)]
        self.gates, self.capacity = gates, capacity

    def encode(self, x):
        out = x.new_zeros(self.experts * self.capacity, self.width)
        for place in self.places:
            out = out.index_add(0, place, x)
        return out

    def decode(self, x):
        return sum(gate[:, None] * x[place] for gate, place in zip(self.gates, self.places, strict=True))


def flatten_sort_count(expert_idxs, num_experts):
    sorted_ids, order = torch.sort(expert_idxs.flatten(), stable=True)
    return sorted_ids, order, torch.bincount(sorted_ids, minlength=num_experts).cumsum(-1)


def parallel_linear(x, weight, k, _ids, order, offsets, gates=None, grouped_in=False, grouped_out=False):
    sizes = offsets.diff(prepend=offsets.new_zeros(1))
    out = by_group(x if grouped_in else x[order // k], weight, sizes)
    if grouped_out:
        return out
    by_row = torch.zeros_like(out).index_copy(0, order, out)
    return (gates[:, None] @ by_row.view(*gates.shape, -1)).squeeze(1)


def whole(x, gate_up, down, index, weight):
    out = torch.zeros_like(x)
    for k in range(index.shape[1]):
        gate, up = torch.einsum("td,tgd->tg", x, gate_up[index[:, k]]).chunk(2, dim=-1)
        out = out + weight[:, k : k + 1] * torch.einsum("tf,tdf->td", functional.silu(gate) * up, down[index[:, k]])
    return out


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
    assert topk_weights.dtype == torch.float32 and topk_ids.dtype == torch.int32
    return whole(hidden_states, w1, w2, topk_ids.long(), topk_weights)


def liger(x, gate_up, down, index, weight):
    assert index.dtype == torch.int32
    return whole(x, gate_up, down, index.long(), weight)


STAND_INS = {
    "grouped_gemm": {"grouped_gemm.ops": {"gmm": gmm}},
    "triton_kernels": {
        "triton_kernels.matmul": {"matmul": matmul},
        "triton_kernels.tensor": {"make_ragged_tensor_metadata": lambda sizes, rows: sizes},
    },
    "fastmoe": {
        "fmoe.functions": {"MOEScatter": Applied(scatter_rows), "MOEGather": Applied(gather_rows)},
        "fmoe.linear": {"MOELinear": Applied(lambda x, sizes, weight, bias: by_group(x, weight.mT, sizes))},
    },
    "tutel": {"tutel": {"moe": ModuleType("moe")}},
    "scattermoe": {
        "scattermoe.parallel_experts": {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    },
    "vllm": {"vllm.model_executor.layers.fused_moe": {"fused_experts": fused_experts}},
    "liger": {"liger_kernel.ops": {"LigerFusedMoEFunction": Applied(liger)}},
}
STAND_INS["tutel"]["tutel"]["moe"].fast_dispatcher = Dispatcher


def stand_in(name, monkeypatch):
    """Put the stand-in of a peer where its imports look, and let its adapter run on a CPU."""
    for path, contents in STAND_INS[name].items():
        words = path.split(".")
        for end in range(1, len(words) + 1):
            module = ModuleType(".".join(words[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(contents)
    adapter = __import__(f"{peers.__name__}.{peers.PEERS[name].module}", fromlist=["build"])
    monkeypatch.setattr(adapter, "need_cuda", lambda _weights: None)
    return adapter


@pytest.mark.parametrize("routing", ["uniform", "hot:1"])
@pytest.mark.parametrize("name", STAND_INS)
def test_an_adapter_computes_the_layer(name, routing, monkeypatch):
    adapter = stand_in(name, monkeypatch)
    dtype = torch.bfloat16 if name == "grouped_gemm" else torch.float32
    train = name not in ("vllm", "triton_kernels")
    weights = make_weights(SMALL, dtype, CPU, 0, train)[0]
    batch = make_batches(SMALL, 7, dtype, CPU, make(routing, SMALL), 0, train)[0]
    layer = adapter.build(weights)
    assert check(layer, weights, batch, "train" if train else "fwd").good
    assert bool(layer.parameters) == train


@pytest.mark.parametrize("name", STAND_INS)
def test_without_cuda_they_say_so(name, monkeypatch):
    adapter = stand_in(name, monkeypatch)
    monkeypatch.setattr(adapter, "need_cuda", peers.need_cuda)
    with pytest.raises(peers.Unavailable, match="CUDA only"):
        adapter.build(make_weights(SMALL, torch.float32, CPU, 0, False)[0])


def test_only_the_dtype_it_has(monkeypatch):
    adapter = stand_in("grouped_gemm", monkeypatch)
    with pytest.raises(peers.Unavailable, match="bfloat16 only"):
        adapter.build(make_weights(SMALL, torch.float32, CPU, 0, False)[0])


def test_the_loop_is_whole():
    weights = make_weights(SMALL, torch.float32, CPU, 0, False)[0]
    batch = make_batches(SMALL, 7, torch.float32, CPU, make("uniform", SMALL), 0, False)[0]
    inputs = (batch.x_TD, batch.index_TK, batch.weight_TK)
    ours = loop.build(weights).call(*inputs)
    theirs = whole(batch.x_TD, weights.gate_up_EGD, weights.down_EDF, *inputs[1:])
    assert torch.allclose(ours, theirs, atol=1e-5)
