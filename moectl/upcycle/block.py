"""One MoE layer as expressions, and the tensors a family stores it in. Every upcycling method ends here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moectl.checkpoint.expressions import Concat, Expression, Literal, Stack
from moectl.checkpoint.plan import OutputTensor, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families.registry import MOE, PAIRS
from moectl.families.shapes import resolved
from moectl.families.spec import Ffn, GatedMlp, MoeFamily, Pair, PlainMlp


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


def check_experts(moe: MoeFamily, experts: int) -> None:
    """Refuse fewer experts than the family's router can run with.

    Raises:
        UsageError: there are fewer.
    """
    if experts < moe.fewest_experts:
        raise UsageError(
            f"--experts {experts} is too few for {moe.model_type}.",
            f"Its router compares groups of experts by the best {moe.fewest_experts} of each.",
            f"Give at least {moe.fewest_experts}, or choose another family with --into.",
        )


def check_dense_layers(pair: Pair, dense_layers: Sequence[int]) -> None:
    """Refuse dense layers between MoE layers where the family has no place for them.

    Raises:
        UsageError: there are some.
    """
    if not dense_layers or MOE[pair.moe].dense_layers is not None:
        return
    able = [other.moe for other in PAIRS if other.dense == pair.dense and MOE[other.moe].dense_layers is not None]
    raise UsageError(
        f"{pair.moe} cannot keep layers {', '.join(map(str, dense_layers))} dense.",
        "All its layers are MoE layers.",
        f"Leave --layers out{', or give --into ' + ' or '.join(able) if able else ''}.",
    )


def emit(block: MoeLayer, moe: MoeFamily, sources: Sequence[Checkpoint], dtype: str) -> Iterator[OutputTensor]:
    """The layer's tensors under the family's names, router first, all of `dtype`."""

    def tensor(pattern: str, expression: Expression, **place: int) -> OutputTensor:
        return planned(pattern.format(layer=block.layer, **place), expression, sources, dtype)

    assert not isinstance(moe.mlp, PlainMlp)
    yield tensor(moe.router, block.router)
    if isinstance(moe.mlp, GatedMlp):
        for number, expert in enumerate(block.experts):
            for pattern, expression in zip((moe.mlp.gate, moe.mlp.up, moe.mlp.down), expert.parts, strict=True):
                yield tensor(pattern, expression, expert=number)
    else:
        yield tensor(moe.mlp.gate_up, Stack(tuple(Concat((expert.gate, expert.up), 0) for expert in block.experts)))
        yield tensor(moe.mlp.down, Stack(tuple(expert.down for expert in block.experts)))
    for spec in moe.biases:
        shape = resolved(spec.shape, {"E": len(block.experts)})
        yield planned(spec.name.format(layer=block.layer), Literal(shape, 0.0), sources, "F32")
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
