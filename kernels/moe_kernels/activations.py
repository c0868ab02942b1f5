"""What stands between the up- and the down-projection of an expert, as data that a kernel can be specialised on.

With h the up-projection of one row, split into gate g and up u, every gated expert in use is

    a = f(min(g, limit)) * (clamp(u, -limit, limit) + offset)

with f one of KINDS: SwiGLU and GeGLU (arXiv 2002.05202), and the clamped ones of gpt-oss (limit 7, alpha 1.702,
offset 1) and of DeepSeek-V4 (limit 10). Without a gate a = f(h): ReLU squared (arXiv 2109.08668) and the plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        kind: the function f, one of KINDS; "silu" is z * sigmoid(alpha * z).
        gated: whether the up-projection holds a gate half and an up half.
        limit: clamp of the gate from above and of the up half from both sides; None for none.
        alpha: the slope inside the sigmoid of "silu".
        offset: what is added to the up half.
    """

    kind: str = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"activation {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind != "silu" and self.alpha != 1.0:
            raise ValueError(f"alpha belongs to silu, not to {self.kind}")
        if not self.gated and (self.limit is not None or self.offset):
            raise ValueError("limit and offset belong to a gated activation")

    def width(self, up_rows: int) -> int:
        """F, the width of what enters the down-projection, from the rows of the up-projection."""
        return up_rows // 2 if self.gated else up_rows

    def __call__(self, h_SG: Tensor, interleaved: bool = False) -> Tensor:
        """The activation in torch, differentiable: [..., G] -> [..., F]; halves one after the other or interleaved."""
        if not self.gated:
            return self.function(h_SG)
        gate, up = (h_SG[..., ::2], h_SG[..., 1::2]) if interleaved else h_SG.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.offset:
            up = up + self.offset
        return self.function(gate) * up

    def function(self, z: Tensor) -> Tensor:
        """f alone."""
        match self.kind:
            case "silu":
                return functional.silu(z) if self.alpha == 1.0 else z * torch.sigmoid(self.alpha * z)
            case "gelu":
                return functional.gelu(z)
            case "gelu_tanh":
                return functional.gelu(z, approximate="tanh")
            case "relu":
                return functional.relu(z)
            case "relu2":
                return functional.relu(z).square()
        return z

    def backward(self, h_SG: Tensor, da_SF: Tensor, interleaved: bool = False) -> Tensor:
        """The gradient to h from the one to the activation, for where autograd is not at work; [..., F] -> [..., G]."""
        if not self.gated:
            return self.pull(da_SF, h_SG)
        gate, up = (h_SG[..., ::2], h_SG[..., 1::2]) if interleaved else h_SG.chunk(2, dim=-1)
        low_gate, low_up = gate, up
        if self.limit is not None:
            low_gate, low_up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        dgate = self.pull(da_SF * (low_up + self.offset), low_gate)
        dup = da_SF * self.function(low_gate)
        if self.limit is not None:
            dgate = dgate.masked_fill(gate > self.limit, 0.0)
            dup = dup.masked_fill(up.abs() > self.limit, 0.0)
        return torch.stack((dgate, dup), -1).flatten(-2) if interleaved else torch.cat((dgate, dup), -1)

    def pull(self, df: Tensor, z: Tensor) -> Tensor:
        """df f'(z): the gradient to z from the one to f(z)."""
        match self.kind:
            case "silu" if self.alpha == 1.0:
                return torch.ops.aten.silu_backward(df, z)
            case "silu":
                s = torch.sigmoid(self.alpha * z)
                return df * s * (1 + self.alpha * z * (1 - s))
            case "gelu":
                return torch.ops.aten.gelu_backward(df, z)
            case "gelu_tanh":
                return torch.ops.aten.gelu_backward(df, z, approximate="tanh")
            case "relu":
                return df * (z > 0)
            case "relu2":
                return 2 * df * functional.relu(z)
        return df


SWIGLU = Activation()
GEGLU = Activation("gelu")
RELU2 = Activation("relu2", gated=False)
GPT_OSS = Activation(limit=7.0, alpha=1.702, offset=1.0)
