"""Routed experts made from one dense FFN."""

from __future__ import annotations

from moectl.checkpoint.expressions import Expression, Noise, Scale
from moectl.families.spec import Ffn


def routed_experts(ffn: Ffn, number: int, key: str, *, noise: float = 0.0, scale: float = 1.0) -> tuple[Ffn, ...]:
    """`number` copies of the FFN, their outputs times `scale`, each with its own noise of standard deviation `noise`.

    Draws are keyed by `key`, the expert's number and the matrix.
    """
    return tuple(_noisy(scaled(ffn, scale), noise, f"{key}.experts.{expert}") for expert in range(number))


def scaled(ffn: Ffn, factor: float) -> Ffn:
    """The FFN with its output times `factor`, by its down matrix alone (exact for powers of two)."""
    return ffn if factor == 1.0 else Ffn(ffn.gate, ffn.up, Scale(ffn.down, factor))


def _noisy(ffn: Ffn, std: float, key: str) -> Ffn:
    def with_noise(x: Expression, matrix: str) -> Expression:
        return Noise(x, std, f"{key}.{matrix}") if std else x

    return Ffn(with_noise(ffn.gate, "gate"), with_noise(ffn.up, "up"), with_noise(ffn.down, "down"))
