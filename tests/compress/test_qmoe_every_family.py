"""Every MoE family through the command: compressed, loaded, and decompressed to what computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pipeline_models import FAMILIES, TWO_STACKS
from pruned_models import loaded
from qmoe_runs import COUNTING, SMALL, compress, memory, names, texts
from typer.testing import CliRunner

import moectl.integrations.transformers as ours
from moectl.checkpoint.source import Checkpoint
from moectl.cli.main import app
from moectl.compress.pipeline import preflight
from moectl.compress.qmoe_families import REFUSED
from moectl.data.tokens import byte_tokenizer
from moectl.families.tiny_moe import tiny_moe
from moectl.layerwise.quiet import quiet

VOCABULARY = {"vocab_size": 258, "vocab_size_per_layer_input": 258, "bos_token_id": 256, "eos_token_id": 256}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(preflight, "_SPEED_SECONDS", 0.0)
    with memory() as directory:
        yield directory


@pytest.mark.parametrize("family", [family for family in [*FAMILIES, *TWO_STACKS] if family not in REFUSED])
def test_it_loads_and_computes_what_its_plain_weights_do(
    family: str, room: Path, record_property: Callable[[str, object], None]
) -> None:
    """All keys find their places, in the coded checkpoint and in the plain one; nothing else is left on the disk."""
    with quiet():
        tiny_moe(family, **VOCABULARY).to(torch.bfloat16).save_pretrained(room / "moe")
    byte_tokenizer().save_pretrained(room / "moe")
    done = compress(room / "moe", room / "q", *SMALL, "--quiet", data=texts(room / "counting.jsonl", COUNTING))
    assert done.exit_code == 0, done.exception
    plain = CliRunner().invoke(app, ["decompress", str(room / "q"), "-o", str(room / "plain"), "--quiet"])
    assert plain.exit_code == 0, plain.exception
    assert names(room) == ["counting.jsonl", "moe", "plain", "q"]
    token_BL = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), quiet():
        models = ours.load(room / "q", dtype=torch.float32).eval(), loaded(Checkpoint.open(room / "plain"))
        given = {"decoder_input_ids": token_BL.flip(1)} if family in TWO_STACKS else {}
        found, wanted = (model(input_ids=token_BL, use_cache=False, **given).logits for model in models)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    record_property("families compressed", 1)
