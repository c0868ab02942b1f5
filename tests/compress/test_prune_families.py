"""Every family that can be pruned: what is left loads completely and computes what the whole did without the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed
from pruned_models import EXPERTS, loaded, logits, made, masked, written
from transformers import CONFIG_MAPPING

from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.families import PRUNABLE, REFUSED
from moectl.compress.prune.layout import Layout, layout_of
from moectl.compress.prune.plan import plan_prune
from moectl.compress.prune.recipe import PruneRecipe
from moectl.compress.prune.saliency import weight_scores
from moectl.compress.prune.scores import Scores
from moectl.errors import InputError
from moectl.families.backend import experts_classes
from moectl.families.registry import MOE
from moectl.families.tiny_moe import model_types, tiny_moe
from moectl.layerwise.quiet import quiet

INSTALLED = installed(*(family for family in PRUNABLE if family in CONFIG_MAPPING))


def by_weights(layout: Layout) -> Scores:
    return Scores(weight_scores(layout), {}, "")


def pruned(source: Checkpoint, path: Path, keep: int = 6) -> tuple[Checkpoint, dict[int, list[int]]]:
    layout = layout_of(source)
    plan = plan_prune(layout, PruneRecipe("aimer", keep=keep), by_weights(layout))
    return written(plan, path), {int(layer): experts for layer, experts in plan.recipe["kept"].items()}


def test_every_family_with_experts_can_be_pruned_or_is_refused_with_a_reason() -> None:
    there = {model_type for family in experts_classes() for model_type in model_types(family)}
    assert there <= PRUNABLE.keys() | REFUSED.keys()
    assert not PRUNABLE.keys() & REFUSED.keys()
    assert MOE.keys() <= PRUNABLE.keys() | {"switch_transformers"}


@pytest.mark.parametrize("family", INSTALLED)
def test_a_pruned_model_is_the_whole_one_whose_router_cannot_choose_the_others(family: str, tmp_path: Path) -> None:
    source = made(tmp_path / "whole", family)
    out, kept = pruned(source, tmp_path / "out")
    model, whole = loaded(out), tiny_moe(family)
    with masked(whole, kept):
        wanted = logits(whole)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=5e-5)
    assert (logits(whole) - wanted).abs().max() > 0.05  # the experts that went did matter
    assert all(len(experts) == 6 for experts in kept.values())


def test_one_expert_in_the_place_of_another_would_be_noticed(tmp_path: Path) -> None:
    out, kept = pruned(made(tmp_path / "whole", "mixtral"), tmp_path / "out")
    gone = (set(range(EXPERTS)) - set(kept[1])).pop()
    kept[1] = sorted([gone, *kept[1][1:]])
    whole = tiny_moe("mixtral")
    with masked(whole, kept):
        assert (logits(loaded(out)) - logits(whole)).abs().max() > 0.05


@pytest.mark.parametrize("family", ["deepseek_v3", "dots1", "kimi_linear"])
def test_grouped_routers_keep_groups_of_one_size(family: str, tmp_path: Path) -> None:
    _, kept = pruned(made(tmp_path / "whole", family), tmp_path / "out")
    assert all(sum(expert < EXPERTS // 2 for expert in experts) == 3 for experts in kept.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_keeping_all_experts_is_the_source_bit_by_bit(family: str, tmp_path: Path) -> None:
    source = made(tmp_path / "whole", family)
    plan = plan_prune(layout_of(source), PruneRecipe(keep=EXPERTS), None)
    out = written(plan, tmp_path / "out")
    assert list(out.tensors) == list(source.tensors)
    assert all(out.read(name).tobytes() == source.read(name).tobytes() for name in source.tensors)
    assert out.config == source.config


def test_what_is_no_expert_and_no_router_is_untouched(tmp_path: Path) -> None:
    source = made(tmp_path / "whole", "qwen2_moe")
    out, kept = pruned(source, tmp_path / "out")
    for name in source.tensors:
        if "experts." not in name and ".mlp.gate." not in name:
            assert out.read(name).tobytes() == source.read(name).tobytes()
    for new, old in enumerate(kept[1]):
        name = "model.layers.1.mlp.experts.{}.up_proj.weight"
        assert out.read(name.format(new)).tobytes() == source.read(name.format(old)).tobytes()


def test_the_plan_moves_bytes_and_knows_its_parameters(tmp_path: Path) -> None:
    source = made(tmp_path / "whole", "gpt_oss")
    layout = layout_of(source)
    plan = plan_prune(layout, PruneRecipe("aimer", ratio=0.25), by_weights(layout))
    assert all(plan.is_copied(tensor) for tensor in plan.tensors)
    with quiet():
        model = loaded(written(plan, tmp_path / "out"))
    assert plan.facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    whole = plan_prune(layout, PruneRecipe(keep=EXPERTS), None)
    # Fewer experts do not make a token cheaper, up to the router's rows and their biases.
    rows = 3 * (EXPERTS - 6) * (model.config.hidden_size + 1)
    assert whole.facts["active_parameters"] - plan.facts["active_parameters"] == rows


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 stores one behind the last layer, and transformers drops it: nothing is measured of its experts."""
    with quiet():
        tiny_moe("deepseek_v3", num_hidden_layers=4).save_pretrained(tmp_path / "whole")
    edit_config(tmp_path / "whole", num_hidden_layers=3, num_nextn_predict_layers=1)
    source = Checkpoint.open(tmp_path / "whole")
    out, kept = pruned(source, tmp_path / "out")
    assert layout_of(source).extra and 3 not in kept
    assert not any(".layers.3." in name for name in out.tensors)
    assert out.config["num_nextn_predict_layers"] == 0
    loaded(out)


@pytest.mark.parametrize("family", installed("switch_transformers", "doge", "dbrx"))
def test_a_refused_family_is_refused_with_its_reason(family: str, tmp_path: Path) -> None:
    source = made(tmp_path / "whole", family)
    with pytest.raises(InputError) as caught:
        layout_of(source)
    assert REFUSED[family].lower() in caught.value.why.lower() and family in caught.value.what


def test_a_tensor_that_does_not_fit_is_named_with_its_file(tmp_path: Path) -> None:
    source = made(tmp_path / "whole", "mixtral")
    edit_config(source.path, num_local_experts=9)
    with pytest.raises(InputError, match=r"model\.safetensors.*block_sparse_moe\.(gate\.weight|experts\.8)"):
        layout_of(Checkpoint.open(source.path))


def edit_config(path: Path, **values: Any) -> None:
    import json

    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
