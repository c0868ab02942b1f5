"""Every MoE family is compressed or refused with a reason, and those that are refused are so before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from installed import installed
from pipeline_models import FAMILIES, TWO_STACKS
from transformers import CONFIG_MAPPING

from moectl.checkpoint.source import Checkpoint
from moectl.compress.calibration import Calibration
from moectl.compress.prune.families import PRUNABLE
from moectl.compress.prune.families import REFUSED as NOT_PRUNED
from moectl.compress.qmoe_families import REFUSED
from moectl.compress.qmoe_job import Job
from moectl.compress.qmoe_recipe import QmoeRecipe
from moectl.errors import InputError
from moectl.families.backend import experts_classes
from moectl.families.tiny_moe import model_types, tiny_moe
from moectl.layerwise.quiet import quiet

INSTALLED = {
    model_type
    for family in experts_classes()
    for model_type in installed(*(model_types(family) if family != "vitpose_backbone" else [family]))
}


def test_every_family_is_run_through_the_pipeline_or_refused_with_a_reason() -> None:
    """`test_pipeline_families.py` runs `FAMILIES`; the page of families lists those of every release."""
    assert INSTALLED - REFUSED.keys() == {*FAMILIES, *TWO_STACKS} - REFUSED.keys()
    assert PRUNABLE.keys() | NOT_PRUNED.keys() >= INSTALLED
    assert REFUSED.keys() <= PRUNABLE.keys() | NOT_PRUNED.keys()


def asked(family: str, place: Path) -> None:
    """As far as the text, which is not there."""
    with quiet():
        tiny_moe(family).to(torch.bfloat16).save_pretrained(place)
    Job.of(Checkpoint.open(place), QmoeRecipe(), Calibration(data=("nowhere.jsonl",)))


def test_the_others_come_as_far_as_their_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        asked("mixtral", tmp_path)


@pytest.mark.parametrize("family", sorted(REFUSED.keys() & INSTALLED & set(CONFIG_MAPPING) - {"vitpose_backbone"}))
def test_a_refused_family_is_refused_before_its_text_is_read(family: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"language model|no routed experts|layers"):
        asked(family, tmp_path)
