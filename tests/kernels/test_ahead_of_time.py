"""Every kernel at every shipped launch choice compiles for the three architectures, spills nothing, and fits.

`resources.json` beside this holds what each takes, for a reader of a change to see what it did; it is written again by

    python tests/kernels/test_ahead_of_time.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Launch, Resources, compiled, recorded
from torch import Tensor

from moe_kernels import GPT_OSS, RELU2, SWIGLU, Activation, target, tuning
from moe_kernels.gpu import experts, router, ternary
from moe_kernels.ternary import Call, TernaryExperts

GOLDEN = Path(__file__).parent / "resources.json"
ARCHS = ("sm_80", "sm_90", "sm_100")
D, F, E, K = 2048, 768, 128, 8


def layer(tokens: int, dtype: torch.dtype, train: bool, activation: Activation = SWIGLU, bias: bool = False) -> None:
    """Run the expert layer, backward too with `train`, on tensors without memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = 2 * F if activation.gated else F
    x, gate_up, down = empty(tokens, D), empty(E, rows, D), empty(E, D, F)
    index = torch.empty(tokens, K, dtype=torch.int64, device="meta")
    weight = torch.empty(tokens, K, device="meta")
    biases = (empty(E, rows), empty(E, D)) if bias else (None, None)
    _, h, plan = experts.forward(x, gate_up, down, index, weight, *biases, activation, activation.offset > 0, train)
    if train:
        assert h is not None and plan is not None
        experts.backward(x, x, h, gate_up, down, weight, *biases, plan, activation, activation.offset > 0)


def ternary_layer(
    tokens: int, dtype: torch.dtype, slots: int, activation: Activation = SWIGLU, bias: bool = False
) -> None:
    """The same with ternary matrices of about 27 weights a codeword, multiplied as they are and decoded."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def coded(rows: int, width: int) -> TernaryExperts:
        codes, offsets = empty(E * rows * width // 27, dtype=torch.uint16), empty(E * rows + 1, dtype=torch.int64)
        return TernaryExperts(codes, offsets, empty(E, rows, 2), empty(1 << 16, dtype=torch.int64), width, slots)

    up, down = coded(2 * F, D), coded(D, F)
    index, weight = empty(tokens, K, dtype=torch.int64), empty(tokens, K, dtype=torch.float32)
    biases = (empty(E, 2 * F), empty(E, D)) if bias else (None, None)
    call = Call(empty(tokens, D), up, down, index, weight, activation, *biases, activation.offset > 0, None)
    ternary.forward(call, activation)
    ternary.decode(up, empty(E, dtype=torch.int64), empty(E, 2 * F, D))


def tokens(line: tuning.Line) -> int:
    """A batch that the line is for."""
    return max(1, int(min(line.rows, 512) * E / K))


def launches(arch: str) -> Iterator[Launch]:
    """The different launches over the lines of the table, types, activations, decoding, routers and ternary experts."""
    with recorded(arch) as seen:
        lines = tuning.packaged(arch)
        for line in lines:
            layer(tokens(line), torch.bfloat16, train=True)
        for line in (lines[0], lines[-1]):
            layer(tokens(line), torch.float32, train=True)
        layer(8192, torch.float16, train=False)
        layer(8192, torch.bfloat16, train=True, activation=GPT_OSS, bias=True)
        layer(8192, torch.bfloat16, train=True, activation=RELU2)
        layer(1, torch.bfloat16, train=False)
        for choice in (("softmax", 1, 1), ("sigmoid", 8, 4)):
            logits, bias = torch.empty(4096, 256, device="meta"), torch.empty(256, device="meta")
            index, weight = router.forward(logits, bias, K, *choice, "top2", True, 2.5)
            router.backward(weight, logits, index, choice[0], True, 2.5)
        ternary_layer(1, torch.bfloat16, slots=3)
        ternary_layer(4, torch.bfloat16, slots=3)
        ternary_layer(4, torch.float32, slots=6, activation=GPT_OSS, bias=True)
    yield from seen


def measured(arch: str) -> dict[str, Resources]:
    """What every launch takes on an architecture, by name; of launches with one name, the largest."""
    found: dict[str, Resources] = {}
    for call in launches(arch):
        types = "/".join(
            sorted({kind[1:] for _, kind in call.signature if kind.startswith("*")} - {"i32", "i64", "u16"})
        )
        name, resources = f"{call.name} {types}", compiled(call, arch)
        if name not in found or resources.registers > found[name].registers:
            found[name] = resources
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_a_spill_and_fits(arch: str, record_property: Any) -> None:
    found = measured(arch)
    assert [name for name, resources in found.items() if resources.spilled] == []
    for name, resources in found.items():
        assert resources.shared <= target.SHARED_MEMORY[arch], name
        kernel, tile, *_, types = name.split(" ")
        if arch == "sm_90" and kernel.startswith("gemm.") and int(tile.split("x")[0]) >= 64 and "16" in types:
            assert resources.wgmma, name
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] == version("triton"):
        assert {name: asdict(resources) for name, resources in found.items()} == golden[arch]
    record_property("kernels compiled ahead of time", len(found))


def main() -> None:
    """Write the golden file."""
    found = {arch: {name: asdict(taken) for name, taken in measured(arch).items()} for arch in ARCHS}
    GOLDEN.write_text(json.dumps({"triton": version("triton"), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
