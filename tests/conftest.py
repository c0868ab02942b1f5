"""Shared set-up: quiet libraries, no network, and helper modules beside the tests that use them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
for directory in ("checkpoint", "cli"):
    sys.path.insert(0, str(Path(__file__).parent / directory))
