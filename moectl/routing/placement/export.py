"""Placements in the files that engines read, all of them JSON.

SGLang (`python/sglang/srt/eplb/expert_location.py`): `physical_to_logical_map` has a row for every layer of the model
and a column for every slot; slot s is on GPU s // (slots / GPUs). Rows of dense layers are never looked at, and are
filled as SGLang fills them.

vLLM: its `EplbState.physical_to_logical_map` has a row for every MoE layer. Its releases (EPLBConfig, 0.32) read no
placement at start; an open pull request (#49572, `initial_expert_map_path`) reads these rows. With it or without, EPLB
moves experts later by itself.

vLLM-Ascend (`vllm_ascend/eplb/core/eplb_utils.py`) reads, for every MoE layer, a list of the experts of each device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moectl.errors import InputError, UsageError
from moectl.text import escape

ENGINES = ("sglang", "vllm", "vllm-ascend")


def require_place(path: Path, engine: str, *, overwrite: bool = False) -> None:
    """Check what can be checked of a placement before it is made.

    Raises:
        UsageError: there is no such engine, no such directory, or `path` exists or is named otherwise.
    """
    if engine not in ENGINES:
        raise UsageError(f"There is no placement for {escape(engine)!r}.", "", f"Give one of {', '.join(ENGINES)}.")
    if path.suffix != ".json":
        raise UsageError(f"{escape(str(path))} is no .json file.", "Engines go by the name.", "End it in .json.")
    if path.exists() and not overwrite:
        raise UsageError(f"{escape(str(path))} exists.", "", "Give another name, or --overwrite.")
    if not path.parent.is_dir():
        raise UsageError(f"{escape(str(path.parent))} is no directory.", "", "Make it, or give another name.")


def export(
    slots: Sequence[Sequence[int]],
    gpus: int,
    layers: Sequence[int],
    path: Path,
    engine: str,
    *,
    overwrite: bool = False,
) -> str:
    """Write a placement; says how the engine is told of it.

    Args:
        slots: for every MoE layer the expert in each slot, GPU after GPU, as many on each.
        gpus: how many there are.
        layers: the number of each MoE layer, as the model counts its layers.
        path: a `.json` file.
        engine: one of ENGINES.

    Raises:
        UsageError: as `require_place`.
        InputError: layers differ in their experts, or GPUs in how many they have: engines have one shape for all.
    """
    require_place(path, engine, overwrite=overwrite)
    if len({(len(row), max(row)) for row in slots}) != 1 or len(slots[0]) % gpus:
        raise InputError(
            f"The slots of the layers, {sorted({len(row) for row in slots})}, are not the same on {gpus} GPUs.",
            "Engines hold as many experts on every GPU, in every layer.",
            "Choose replicas so that experts and replicas divide by the GPUs.",
        )
    document = _sglang(slots, layers) if engine == "sglang" else slots if engine == "vllm" else _ascend(slots, gpus)
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    redundant = len(slots[0]) - max(slots[0]) - 1
    return {
        "sglang": f"--init-expert-location {escape(str(path))} --ep-num-redundant-experts {redundant}",
        "vllm": f'--enable-eplb --eplb-config \'{{"num_redundant_experts": {redundant}, '
        f'"initial_expert_map_path": "{escape(str(path))}"}}\' (vLLM pull request #49572; releases read no placement)',
        "vllm-ascend": f'--additional-config \'{{"eplb_config": {{"expert_map_path": "{escape(str(path))}"}}}}\'',
    }[engine]


def _sglang(slots: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[str, Any]:
    experts = max(slots[0]) + 1
    rows = [[slot % experts for slot in range(len(slots[0]))] for _ in range(max(layers) + 1)]
    for layer, row in zip(layers, slots, strict=True):
        rows[layer] = list(row)
    return {"physical_to_logical_map": rows}


def _ascend(slots: Sequence[Sequence[int]], gpus: int) -> dict[str, Any]:
    each = len(slots[0]) // gpus
    return {
        "moe_layer_count": len(slots),
        "layer_list": [
            {
                "layer_id": number,
                "device_count": gpus,
                "device_list": [
                    {"device_id": gpu, "device_expert": list(row[gpu * each : (gpu + 1) * each])} for gpu in range(gpus)
                ],
            }
            for number, row in enumerate(slots)
        ],
    }
