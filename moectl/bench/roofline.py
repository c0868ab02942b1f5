"""The least time an expert layer can take on a device of P FLOP/s and BW bytes/s: pure arithmetic.

T tokens, D hidden size, F expert width, E experts, S routed rows, A experts that got any, b bytes per element.

Forward: 6*S*D*F FLOPs (three products of 2*S*D*F); every token is read and written once, the weights of the A experts
read once: b*(2*T*D + 3*D*F*A). Backward: twice the FLOPs; x, dy and dx, the saved up-projection, the weights of the A
experts again, and gradients of all E: b*(3*T*D + 2*S*F + 3*D*F*A + 3*D*F*E). A and S are those of the drawn routing.

`kernels` are the same with a kernel per step (SonicMoE's algorithm, arXiv 2512.14080): each its own floor, added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from moectl.bench.shapes import Shape

WHATS = ("fwd", "bwd", "train", "decode")


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that have to be done and moved."""

    flops: float
    nbytes: float

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds: whichever of the two takes longer."""
        return max(self.flops / flops_per_s, self.nbytes / bytes_per_s)

    def bound(self, flops_per_s: float, bytes_per_s: float) -> str:
        """Which of the two it is: "compute" or "memory"."""
        return "compute" if self.flops / flops_per_s > self.nbytes / bytes_per_s else "memory"

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


def expected_active(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that T tokens with uniform routing are expected to hit: E * (1 - (1 - K/E)^T)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def ideal(what: str, shape: Shape, tokens: float, rows: float, active: float, itemsize: int) -> list[Work]:
    """The passes of `what`, which have to follow each other: one Work each."""
    d, f, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    forward = Work(6 * rows * d * f, itemsize * (2 * tokens * d + 3 * d * f * active))
    backward_bytes = 3 * tokens * d + 2 * rows * f + 3 * d * f * (active + experts)
    backward = Work(12 * rows * d * f, itemsize * backward_bytes)
    return {"fwd": [forward], "decode": [forward], "bwd": [backward], "train": [forward, backward]}[what]


def kernels(what: str, shape: Shape, tokens: float, rows: float, active: float, itemsize: int) -> dict[str, Work]:
    """The steps of `what` by name; a training forward also writes the up-projection."""
    d, f, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    unit = 2 * rows * d * f
    saved = 3 if what == "train" else 1

    def work(flops: float, elements: float) -> Work:
        return Work(flops, itemsize * elements)

    forward = {
        "up": work(2 * unit, tokens * d + 2 * d * f * active + saved * rows * f),
        "down": work(unit, rows * f + d * f * active + rows * d),
        "combine": work(0, rows * d + tokens * d),
    }
    backward = {
        "dact": work(unit, tokens * d + d * f * active + 5 * f * rows),
        "ddown": work(unit, f * rows + tokens * d + d * f * experts),
        "dx": work(2 * unit, 2 * f * rows + 2 * d * f * active + rows * d),
        "dgate_up": work(2 * unit, tokens * d + 2 * f * rows + 2 * d * f * experts),
        "reduce": work(0, rows * d + tokens * d),
    }
    return {"fwd": forward, "decode": forward, "bwd": backward, "train": forward | backward}[what]


def padding_waste(counts: list[int], block: int) -> float:
    """Share of the rows of all blocks that hold no token when every expert's rows are cut into blocks of `block`."""
    padded = sum(-(-count // block) * block for count in counts)
    return 1 - sum(counts) / padded if padded else 0.0


def imbalance(counts: list[int]) -> float:
    """Rows of the busiest expert over the mean of all: 1 when balanced, E when one has everything."""
    return max(counts) * len(counts) / sum(counts) if sum(counts) else 1.0
