"""These modules want a CUDA device, and are not collected without one: `benchmarks/gpu_check.sh` runs them on one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

for directory in ("kernels", "kernels/interpreted", "routers"):
    sys.path.insert(0, str(Path(__file__).parent.parent / directory))

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
