"""Releases of transformers that cannot run a family are told apart from those that can, and the error names one."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError
from moectl.families import releases
from moectl.families.tiny_moe import tiny_moe
from moectl.integrations.recorded import recorded_routers
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config


def pretend(version: str, patch: pytest.MonkeyPatch) -> None:
    """Have transformers say that it is some version."""
    patch.setattr(metadata, "version", lambda _package: version)


@pytest.mark.parametrize(
    ("installed", "older"),
    [("5.17.0", True), ("5.9.1", True), ("4.57.3", True), ("5.18.0.dev0", False), ("5.100.0", False), ("6.0", False)],
)
def test_versions_are_compared_as_numbers(installed: str, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(installed, monkeypatch)
    assert releases.is_older("5.18") == older


def test_a_family_that_a_release_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        tiny_moe("switch_transformers").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    pretend("5.18.0", monkeypatch)
    assert read_config(checkpoint).model_type == "switch_transformers"
    pretend("5.17.3", monkeypatch)
    with pytest.raises(InputError, match=r"transformers 5\.17\.3 does not run switch_transformers") as refused:
        read_config(checkpoint)
    assert "transformers>=5.18" in refused.value.fix
    for config in ({"text_config": {"model_type": "aria_text"}}, {"base_config": {"model_type": "doge"}}):
        with pytest.raises(InputError, match="does not run"):
            releases.refuse_older(config)
    assert all(name in CONFIG_MAPPING for name in releases.WORKS_SINCE)


def test_experts_without_a_known_router_are_no_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in releases that record no routers of a family: it would be trained without being balanced."""
    model = tiny_moe("mixtral")
    assert len(recorded_routers(model)) == 3
    monkeypatch.setattr(type(model.model), "_can_record_outputs", {})
    monkeypatch.setattr(type(model), "_can_record_outputs", {})
    for module in model.modules():
        module.__dict__.pop("_can_record_outputs", None)
    with pytest.raises(InputError, match="does not say where MixtralForCausalLM has its routers") as refused:
        recorded_routers(model)
    assert f"transformers>={releases.RECORDS}" in refused.value.fix
