"""One MoE layer as expressions, and the tensors a family stores it in. Every upcycling method ends here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moectl.checkpoint.expressions import Concat, Expression, Stack
from moectl.checkpoint.plan import OutputTensor, planned
from moectl.checkpoint.source import Checkpoint
from moectl.families.spec import Ffn, GatedMlp, MoeFamily


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """What a MoE layer is made of: the router [E, H], E routed experts, and perhaps a shared one.

    `shared_gate` is the row [1, H] whose sigmoid scales the shared expert, in families that have one.
    """

    layer: int
    router: Expression
    experts: tuple[Ffn, ...]
    shared: Ffn | None = None
    shared_gate: Expression | None = None


def emit(block: MoeLayer, moe: MoeFamily, sources: Sequence[Checkpoint], dtype: str) -> Iterator[OutputTensor]:
    """The layer's tensors under the family's names, router first, all of `dtype`."""

    def tensor(pattern: str, expression: Expression, **place: int) -> OutputTensor:
        return planned(pattern.format(layer=block.layer, **place), expression, sources, dtype)

    yield tensor(moe.router, block.router)
    if isinstance(moe.mlp, GatedMlp):
        for number, expert in enumerate(block.experts):
            for pattern, expression in zip((moe.mlp.gate, moe.mlp.up, moe.mlp.down), expert.parts, strict=True):
                yield tensor(pattern, expression, expert=number)
    else:
        yield tensor(moe.mlp.gate_up, Stack(tuple(Concat((expert.gate, expert.up), 0) for expert in block.experts)))
        yield tensor(moe.mlp.down, Stack(tuple(expert.down for expert in block.experts)))
    if block.shared is not None:
        assert moe.shared is not None, f"{moe.model_type} has no shared expert"
        if isinstance(moe.shared.mlp, GatedMlp):
            names = (moe.shared.mlp.gate, moe.shared.mlp.up, moe.shared.mlp.down)
            for pattern, expression in zip(names, block.shared.parts, strict=True):
                yield tensor(pattern, expression)
        else:
            yield tensor(moe.shared.mlp.gate_up, Concat((block.shared.gate, block.shared.up), 0))
            yield tensor(moe.shared.mlp.down, block.shared.down)
    if block.shared_gate is not None:
        assert moe.shared is not None and moe.shared.gate_row is not None
        yield tensor(moe.shared.gate_row, block.shared_gate)
