"""The router of a Branch-Train-MiX model of three domains tells them apart, and the report says so.

The model is made here: a tiny seed, a branch for each domain, mixed and trained briefly. MOECTL_BTX names another
checkpoint of the same three domains, trained for longer, that is then looked at in its place.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.families.tiny import tiny_model
from moectl.routing.analysis import Analysis, analyse
from moectl.routing.judge import apart
from moectl.routing.page.render import render
from moectl.routing.report import Report
from moectl.routing.run import Settings, record
from moectl.routing.verdict import verdict
from moectl.traces.domains import separation
from moectl.training.recipe import TrainRecipe
from moectl.training.run import train
from moectl.training.world import World
from moectl.upcycle.btx import plan_btx
from moectl.upcycle.btx_models import open_models
from moectl.upcycle.btx_recipe import BtxRecipe, Expert

DATA = ("builtin:code", "builtin:prose", "builtin:arithmetic")
TOKENS = 24_576
MARGIN = 0.1
"""How far above chance the lower end of the interval of the domain's probability is."""


def recipe(data: tuple[str, ...], steps: int) -> TrainRecipe:
    return TrainRecipe(data=data, steps=steps, batch_size=8, sequence_length=64, learning_rate=3e-3, warmup=2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("MOECTL_BTX"):
        return Path(given)
    directory = tmp_path_factory.mktemp("btx")
    alone = World(0, 1, torch.device("cpu"))
    sizes = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": BYTE_EOS_ID, "num_hidden_layers": 2}
    tiny_model("llama", initializer_range=0.1, **sizes).save_pretrained(directory / "seed")
    byte_tokenizer().save_pretrained(directory / "seed")
    experts = []
    for number, spec in enumerate(DATA):
        branch = directory / f"branch-{number}"
        train(Checkpoint.open(directory / "seed"), recipe((spec,), 15), branch, alone)
        experts.append(Expert(str(branch), data=(spec,)))
    mixed = BtxRecipe(tuple(experts), top_k=1, router_init="text")
    write(plan_btx(open_models(mixed), mixed, directory / "statistics"), directory / "start")
    train(Checkpoint.open(directory / "start"), recipe(DATA, 15), directory / "btx", alone)
    return directory / "btx"


@pytest.fixture(scope="module")
def analysis(mixture: Path) -> Analysis:
    recordings = record(Checkpoint.open(mixture), DATA, Settings(max_tokens=TOKENS, split="heldout"))
    return analyse("btx", recordings)


def test_the_path_tells_the_domain_of_held_out_text(analysis: Analysis) -> None:
    told = analysis.streams[0].separation
    assert told is not None and set(told.domains) == {"code", "prose", "arithmetic"}
    token, document = told.token, told.document
    assert token.probability_interval[0] > token.chance_probability + MARGIN
    assert document.accuracy_interval[0] > document.chance_accuracy + MARGIN


def test_documents_that_are_dealt_to_domains_anew_are_not_told_apart(analysis: Analysis) -> None:
    """What the margin is for: the same paths, under names that mean nothing."""
    trace = analysis.streams[0].recording.trace
    dealt = np.random.default_rng(0).permutation(trace.tokens.domain_N)
    told = separation(replace(trace, tokens=replace(trace.tokens, domain_N=dealt)))
    assert told is not None
    assert told.token.probability_interval[0] < told.token.chance_probability + MARGIN
    assert told.document.accuracy_interval[0] < told.document.chance_accuracy + MARGIN


def test_the_report_says_so(analysis: Analysis) -> None:
    (domains,) = [card for card in verdict(analysis) if card.topic == "Domains"]
    assert domains.level == "good" and domains.headline.startswith("Domains use different experts in layer")
    assert any(apart(shares) for shares in analysis.streams[0].domains)
    assert domains.detail in render(Report(analysis))
