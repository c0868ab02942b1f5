"""Where a checkpoint keeps the matrices of its experts and of its routers, one by one, however they are fused."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from moectl.checkpoint.dtypes import FLOATS
from moectl.checkpoint.header import TensorRef
from moectl.families.components import FUSED_EXPERTS, PER_EXPERT, component


def expert_tensors(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, list[TensorRef]]]:
    """For every experts module and matrix, a reference per expert, in their order; floating point only."""
    found: dict[str, dict[str, list[tuple[int, TensorRef]]]] = defaultdict(lambda: defaultdict(list))
    for name, ref in tensors.items():
        if ref.dtype not in FLOATS:
            continue
        if single := PER_EXPERT.fullmatch(name):
            found[single["block"]][single["matrix"]].append((int(single["expert"]), ref))
        elif len(ref.shape) == 3 and (fused := FUSED_EXPERTS.fullmatch(name)):
            found[fused["block"]][fused["matrix"]] += enumerate(_slices(ref))
    return {
        block: {
            matrix: [ref for _number, ref in sorted(numbered, key=lambda pair: pair[0])]
            for matrix, numbered in matrices.items()
        }
        for block, matrices in found.items()
    }


def router_tensors(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The weight [E, D] of the router of each MoE block, by the block's name (`moe_block`)."""
    return {
        moe_block(name): ref
        for name, ref in tensors.items()
        if ref.dtype in FLOATS and component(name) == "router" and len(ref.shape) == 2 and ref.shape[0] > 1
    }


def moe_block(name: str) -> str:
    """The MoE block that a router's tensor or an experts module is part of."""
    return re.sub(r"\.(experts|gate\.wg|gate|router)(\.\w+)*$", "", name)


def _slices(ref: TensorRef) -> list[TensorRef]:
    """One reference per expert of a fused [E, ...] tensor."""
    size = ref.nbytes // ref.shape[0]
    return [
        TensorRef(f"{ref.name}[{expert}]", ref.dtype, ref.shape[1:], ref.file, ref.offset + expert * size, size)
        for expert in range(ref.shape[0])
    ]
