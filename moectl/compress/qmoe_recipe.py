"""What to quantise experts to: the options of `moectl compress qmoe`, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moectl.errors import UsageError
from moectl.text import shown

if TYPE_CHECKING:
    import torch

    from moectl.compress.quantise.method import Method

GRIDS = (2, 3, 4)
"""Bits of uniform grids; any other number is a target for the ternary code."""
DENSE = ("bf16", "int8", "int4")
CODES = ("tunstall", "qmoe")
EXPORTS = {"w2a16": 2, "w4a16": 4}
MIN_TOKENS = 32
"""Below so many tokens a Hessian says more of the few tokens than of the expert: it is rounded to nearest."""


@dataclass(frozen=True)
class QmoeRecipe:
    """How the weights are to be stored.

    Attributes:
        bits: 2, 3 or 4 for a uniform grid; less than 2 is what ternary weights shall take, code and rows together;
            None is 0.9 for the code and what rows take.
        group_size: weights of a row that share a scale of a uniform grid; -1 for the whole row.
        symmetric: levels are as far below zero as above, as `w2a16` and `w4a16` need it.
        compat: ternary levels and thresholds as in the paper (arXiv 2310.16795).
        code: of ternary weights: `tunstall`, or the paper's dictionary `qmoe`.
        dense: what the weights beside the experts are stored in; bf16 leaves them as they are, as an export does.
        min_tokens: experts that were given fewer are rounded to nearest.
        all_experts: every expert is shown every token.
        gate_weighted: tokens count as much as their gate (MoEQuant, arXiv 2505.03804).
        batch_experts: how many experts are quantised at once.
        export: write the format of compressed-tensors, w2a16 or w4a16, in place of our own.
    """

    bits: float | None = None
    group_size: int = 128
    symmetric: bool = False
    compat: bool = False
    code: str = "tunstall"
    dense: str = "int8"
    min_tokens: int = MIN_TOKENS
    all_experts: bool = False
    gate_weighted: bool = False
    batch_experts: int = 16
    export: str | None = None
    shard_bytes: int = 5_000_000_000

    def checked(self) -> QmoeRecipe:
        """The recipe with what follows from `export` filled in.

        Raises:
            UsageError: a value is not known, or two contradict.
        """
        self._check_values()
        if self.export is None:
            return self
        bits = EXPORTS[self.export]
        if self.bits not in (None, bits) or self.compat:
            raise UsageError(
                f"--export {self.export} has {bits} bits.",
                "What it stores is a uniform grid, symmetric about zero.",
                "Leave --bits and --qmoe-compat out.",
            )
        if self.dense == "int4":
            raise UsageError(
                f"--export {self.export} leaves what is no expert's as it is.",
                "Its readers are told that experts alone are packed.",
                "Leave --dense out, or --export.",
            )
        return replace(self, bits=bits, symmetric=True, dense="bf16")

    @property
    def is_ternary(self) -> bool:
        """Whether weights have three values."""
        return self.bits not in GRIDS

    @property
    def words(self) -> str:
        """What the experts become."""
        if not self.is_ternary:
            return f"{self.bits:g} bits per expert weight" + (f", {self.export}" if self.export else "")
        return "ternary experts" + (f" of {self.bits:g} bits per weight" if self.bits else "")

    def method(self, dtype: torch.dtype) -> Method:
        """The quantiser, for weights of a checkpoint in `dtype`."""
        from moectl.compress.quantise.method import method

        return method(
            self.bits,
            compat=self.compat,
            group_size=self.group_size,
            symmetric=self.symmetric,
            code=self.code,
            dtype=dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """What was asked for."""
        return asdict(self)

    def _check_values(self) -> None:
        for option, value, known in (
            ("--dense", self.dense, DENSE),
            ("--code", self.code, CODES),
            ("--export", self.export, (None, *EXPORTS)),
        ):
            if value not in known:
                names = ", ".join(name for name in known if name)
                raise UsageError(f"{option} {shown(value)!r} is not known.", "", f"Give one of {names}.")
        if self.bits is not None and not (self.bits in GRIDS or 0 < self.bits < 2):
            raise UsageError(
                f"--bits {self.bits:g} is neither 2, 3 or 4 nor less than 2.",
                "2, 3 and 4 are uniform grids; less is what ternary weights shall take.",
                "Give 2, 3, 4, or a target such as 0.8; leave it out for 0.9 and what rows take besides.",
            )
        if self.compat and (self.bits is not None or self.symmetric):
            raise UsageError(
                "--qmoe-compat takes neither --bits nor --symmetric.",
                "The paper's thresholds and levels follow from the weights alone.",
                "Leave one of them out.",
            )
        if self.is_ternary and self.export is None and self.group_size != 128:
            raise UsageError(
                "--group-size is for --bits 2, 3 and 4.", "Ternary weights have levels per row.", "Leave it out."
            )
        if self.group_size != -1 and self.group_size < 8:
            raise UsageError(f"--group-size {self.group_size} is too small.", "", "Give 128, 64, 32, or -1 for rows.")
        if (self.export or not self.is_ternary) and self.code != "tunstall":
            raise UsageError("--code is for ternary weights.", "A uniform grid is stored bit by bit.", "Leave it out.")
