"""The expert layer on a CPU: torch's own matrix products, expert by expert, over rows that are grouped once.

`forward` and `backward` are what `expert_mlp` calls, `grouped_mm` and `grouped_outer` what its unfused form is made of,
and `pack` is for weights that no longer change.
"""

from moe_kernels.cpu.gradients import backward
from moe_kernels.cpu.layer import forward
from moe_kernels.cpu.packed import PackedExperts, pack
from moe_kernels.cpu.products import grouped_mm, grouped_outer

__all__ = ["PackedExperts", "backward", "forward", "grouped_mm", "grouped_outer", "pack"]
