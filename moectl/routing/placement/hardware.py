"""The GPUs that a layer of gated experts runs on, the sizes of that layer, and the seconds that follow from both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, as FasterMoE models them (PPoPP 2022).

    Attributes:
        compute_s: of an expert for one token, in all passes.
        exchange_s: of sending one token's features, all the times that they are sent.
        expert_s: of sending one expert's weights.
    """

    compute_s: float
    exchange_s: float
    expert_s: float

    @property
    def token_s(self) -> float:
        """Of a token at a GPU."""
        return self.compute_s + self.exchange_s


@dataclass(frozen=True, slots=True)
class Hardware:
    """What what-ifs that model time ask of GPUs and of a layer; their options add to it.

    Attributes:
        gpus: that the experts of a layer are on.
        hidden_size, intermediate_size: of the model and of an expert.
        value_bytes: of a weight, and of a feature that is sent.
        tflops: what a GPU computes of experts in a second, in 10^12 operations.
        gb_per_s: what a GPU sends or receives in a second.
        training: three passes of computing, four exchanges of tokens, and gradients; else one, two, and none.
    """

    gpus: int = 8
    hidden_size: int = 2048
    intermediate_size: int = 1024
    value_bytes: float = 2.0
    tflops: float = 200.0
    gb_per_s: float = 50.0
    training: bool = True

    @property
    def expert_weights(self) -> int:
        """Of one expert's three matrices."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_bytes(self) -> float:
        """Of one expert's three matrices."""
        return self.expert_weights * self.value_bytes

    @property
    def passes(self) -> int:
        """How often an expert computes a token: forward, and backward for features and for weights."""
        return 3 if self.training else 1

    @property
    def cost(self) -> Cost:
        """Of tokens and of experts: two operations a weight, features there and back in every direction."""
        exchanges = 4 if self.training else 2
        return Cost(
            self.passes * 2 * self.expert_weights / (self.tflops * 1e12),
            exchanges * self.hidden_size * self.value_bytes / (self.gb_per_s * 1e9),
            self.expert_bytes / (self.gb_per_s * 1e9),
        )

    def said(self) -> str:
        """The layer and its passes, for what a finding rests on."""
        times = "three passes and four exchanges of tokens (training)" if self.training else "one pass, two exchanges"
        return f"experts of 3 x {self.hidden_size} x {self.intermediate_size} weights, {times}"
