"""Every family that `moectl compress qmoe` takes: all are compressed, and then one fresh process loads them all.

What they compute is compared with the same checkpoint made plain while it is loaded; `test_qmoe_by_hand.py`
compares with weights that moectl has not decoded. Ternary experts and grids, and the kinds of dense parts, take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_models import FAMILIES, TWO_STACKS
from qmoe_runs import memory

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.compress import qmoe_job
from moectl.compress.calibration import Calibration
from moectl.compress.qmoe_families import REFUSED
from moectl.compress.qmoe_job import Job
from moectl.compress.qmoe_recipe import QmoeRecipe
from moectl.data.tokens import byte_tokenizer
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet

KINDS = sorted({*FAMILIES, *TWO_STACKS} - REFUSED.keys())
RECIPES = [
    QmoeRecipe(min_tokens=2, **given)
    for given in ({}, {"bits": 4, "group_size": 32}, {"dense": "int4"}, {"bits": 2, "group_size": 32, "dense": "bf16"})
]
TOLERANCE = 1e-5

LOADING = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from moectl.families.tiny_moe import tiny_inputs
from moectl.integrations.transformers import load
from moectl.layerwise.quiet import quiet

for kind in sys.stdin.read().split():
    place = Path(sys.argv[1]) / kind
    with quiet(), torch.no_grad():
        coded = load(place, dtype=torch.float32)
        config = AutoConfig.from_pretrained(place)
        config.quantization_config["dequantize"] = True
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        plain, info = auto.from_pretrained(place, config=config, dtype=torch.float32, output_loading_info=True)
        found, expected = (model(**tiny_inputs(model))[0] for model in (coded, plain))
        distance = float((found - expected).norm() / expected.norm())
    print(json.dumps({"kind": kind, "distance": distance, "gaps": sum(map(len, info.values()))}))
"""


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[str, dict[str, Any]]]:
    """What a fresh process says of each compressed model."""
    token_BL = np.random.default_rng(0).integers(3, 96, (4, 24))
    with pytest.MonkeyPatch.context() as patch, memory() as root, quiet():
        patch.setattr(qmoe_job, "calibration_tokens", lambda *_: token_BL)
        for number, kind in enumerate(KINDS):
            tiny_moe(kind).to(torch.bfloat16).save_pretrained(root / "source" / kind)
            byte_tokenizer().save_pretrained(root / "source" / kind)  # pairs are made as it has sentinels or not
            recipe = RECIPES[number % len(RECIPES)]
            job = Job.of(Checkpoint.open(root / "source" / kind), recipe, Calibration(data=("random",)))
            paths = job.run(root / "work" / kind, lambda _said: None, lambda _share: None)
            write(job.plan(paths)[0], root / kind)
        command = [sys.executable, "-W", "ignore", "-c", LOADING, str(root)]
        said = subprocess.run(command, input="\n".join(KINDS), text=True, check=True, stdout=subprocess.PIPE).stdout
        yield {each["kind"]: each for each in map(json.loads, said.splitlines())}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_compressed_loads_and_computes_what_it_does_made_plain(
    kind: str, loaded: dict[str, dict[str, Any]], record_property: Any
) -> None:
    """Not a key is missing, unexpected or of another shape."""
    assert loaded[kind]["gaps"] == 0
    assert loaded[kind]["distance"] <= TOLERANCE
    record_property("compressed families", 1)
