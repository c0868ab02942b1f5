"""Expert kernels for Mixture-of-Experts layers, each beside a torch reference."""

from moe_kernels.activations import GEGLU, GPT_OSS, RELU2, SWIGLU, Activation
from moe_kernels.dispatch import Dispatch, dispatch
from moe_kernels.experts import expert_mlp
from moe_kernels.router import route, top
from moe_kernels.ternary import TernaryExperts, ternary_mlp

__all__ = [
    "GEGLU",
    "GPT_OSS",
    "RELU2",
    "SWIGLU",
    "Activation",
    "Dispatch",
    "TernaryExperts",
    "dispatch",
    "expert_mlp",
    "route",
    "ternary_mlp",
    "top",
]
