"""How often OLMoE and Mixtral used each expert, as published in allenai/OLMoE (Apache-2.0), scripts/routing_output.

208,896 tokens of each domain, at three layers: 0, 7 and 15 of OLMoE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODELS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())["models"]
"""`olmoe` and `mistral`: num_experts, top_k, and domains -> layers -> assignments to each expert."""
