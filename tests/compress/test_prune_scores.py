"""Scores on disk: what is chosen by them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pruned_models import EXPERTS, made
from safetensors.numpy import save_file

from moectl.compress.prune.layout import Layout, layout_of
from moectl.compress.prune.plan import plan_prune
from moectl.compress.prune.recipe import METHODS, PruneRecipe, check_subsets
from moectl.compress.prune.scores import Scores, choose, chosen, read_scores, write_scores
from moectl.errors import InputError, UsageError

ABOUT = {"data": ["builtin:code"], "samples": 4, "seq_len": 16, "tokens": 64}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    place = tmp_path_factory.mktemp("models")
    models = {
        "mixtral": ("mixtral", {}),
        "other seed": ("mixtral", {"seed": 1}),
        "grouped": ("deepseek_v3", {}),
    }
    return {name: layout_of(made(place / name, family, **sizes)) for name, (family, sizes) in models.items()}


def statistics(layout: Layout, **changed: Any) -> dict[int, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    names = ("tokens", "norms", "gated_norms")
    return {
        layer: {name: random.integers(1, 100, EXPERTS).astype(float) for name in names} | changed
        for layer in layout.layers
    }


def test_what_is_written_is_read_and_many_ratios_follow(layouts: dict[str, Layout], tmp_path: Path) -> None:
    layout, path = layouts["mixtral"], tmp_path / "scores.safetensors"
    values = statistics(layout)
    write_scores(path, layout, values, ABOUT)
    kept: dict[int, set[int]] = {}
    for keep in (7, 5, 3):
        for method in ("reap", "frequency", "ean"):
            scores = read_scores(path, layout, method, keep)
            assert scores.about == {"model": layout.source.name, **ABOUT}
            plan = plan_prune(layout, PruneRecipe(method, keep=keep), scores)
            assert plan.recipe["kept"]["0"] == sorted(plan.recipe["kept"]["0"]) and plan.recipe["keep"] == keep
        of_layer = set(plan.recipe["kept"]["0"])
        assert of_layer <= kept.get(0, of_layer), "fewer are a part of more"
        kept[0] = of_layer
    wanted = np.argsort(values[1]["gated_norms"] / values[1]["tokens"])[2:]
    assert set(choose(layout, read_scores(path, layout, "reap", 6), "reap", 6)[1]) == set(wanted.tolist())


def test_the_same_scores_plan_the_same_and_others_do_not(layouts: dict[str, Layout]) -> None:
    layout = layouts["mixtral"]
    recipe = PruneRecipe("frequency", ratio=0.25)
    one, same = (plan_prune(layout, recipe, Scores(statistics(layout), ABOUT, "one")) for _ in range(2))
    other = plan_prune(layout, recipe, Scores(statistics(layout), ABOUT, "other"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@given(
    st.integers(1, 4).flatmap(
        lambda groups: st.tuples(
            st.just(groups),
            st.integers(2, 6).flatmap(
                lambda size: st.tuples(
                    st.integers(1, size),
                    st.lists(st.floats(0, 9, width=16), min_size=size * groups, max_size=size * groups),
                )
            ),
        )
    )
)
def test_the_best_of_each_group_are_chosen(case: tuple[int, tuple[int, list[float]]]) -> None:
    groups, (each, values) = case
    saliency_E, size = np.array(values), len(values) // groups
    kept = chosen(saliency_E, each * groups, groups)
    assert list(kept) == sorted(set(kept)) and len(kept) == each * groups
    for group in range(groups):
        inside = [expert for expert in kept if expert // size == group]
        outside = [expert for expert in range(group * size, group * size + size) if expert not in kept]
        assert len(inside) == each
        assert all(saliency_E[i] >= saliency_E[o] for i in inside for o in outside)


@pytest.mark.parametrize(
    ("recipe", "model", "says"),
    [
        ({}, "mixtral", "One of --ratio and --keep"),
        ({"ratio": 0.5, "keep": 4}, "mixtral", "contradict"),
        ({"ratio": 1.0}, "mixtral", "not a share"),
        ({"keep": 0}, "mixtral", "leaves no expert"),
        ({"keep": 4, "method": "random"}, "mixtral", "not known"),
        ({"ratio": 0.9}, "mixtral", "1 of 8 experts cannot be kept"),
        ({"keep": 9}, "mixtral", "9 of 8 experts cannot be kept"),
        ({"keep": 5}, "grouped", "not a multiple of 2"),
        ({"keep": 2}, "grouped", "2 of 8 experts cannot be kept"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    recipe: dict[str, Any], model: str, says: str, layouts: dict[str, Layout]
) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        asked = PruneRecipe(**recipe)
        asked.check()
        asked.kept(layouts[model])
    assert caught.value.fix


def test_a_ratio_rounds_what_goes_down(layouts: dict[str, Layout]) -> None:
    assert [PruneRecipe(ratio=ratio).kept(layouts["mixtral"]) for ratio in (0, 0.12, 0.25, 0.5)] == [8, 8, 6, 4]
    assert [PruneRecipe(ratio=ratio).kept(layouts["grouped"]) for ratio in (0, 0.2, 0.25, 0.5)] == [8, 8, 6, 4]


def test_naee_is_refused_where_it_would_take_forever(layouts: dict[str, Layout]) -> None:
    from dataclasses import replace

    check_subsets(layouts["mixtral"], 4)
    with pytest.raises(UsageError, match="subsets of 96 of 128"):
        check_subsets(replace(layouts["mixtral"], experts=128), 96)


def test_scores_of_another_model_are_refused(layouts: dict[str, Layout], tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, layouts["mixtral"], statistics(layouts["mixtral"]), ABOUT)
    for other in ("other seed", "grouped"):
        with pytest.raises(InputError, match=r"scores\.safetensors holds scores of another model \(mixtral\)"):
            read_scores(path, layouts[other], "reap", 6)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_and_is_not_there_is_named(method: str, layouts: dict[str, Layout], tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, layouts["mixtral"], {layer: {"norms": np.ones(EXPERTS)} for layer in range(3)}, ABOUT)
    with pytest.raises(InputError, match=rf"scores\.safetensors has no tensor 'layers\.0\.\w+', which {method}"):
        read_scores(path, layouts["mixtral"], method, 6)


def test_files_that_are_no_scores_are_refused(layouts: dict[str, Layout], tmp_path: Path) -> None:
    layout, path = layouts["mixtral"], tmp_path / "scores.safetensors"
    save_file({"x": np.ones(3)}, path)
    with pytest.raises(InputError, match="is no file of scores"):
        read_scores(path, layout, "reap", 6)
    path.unlink()
    write_scores(path, layout, statistics(layout, tokens=np.full(EXPERTS, np.nan)), ABOUT)
    with pytest.raises(InputError, match=r"tensor 'layers\.0\.tokens' that is not 8 finite numbers"):
        read_scores(path, layout, "reap", 6)


def test_a_layer_whose_experts_were_hardly_seen_is_named(layouts: dict[str, Layout]) -> None:
    for name, cold in (("mixtral", [0, 1, 2]), ("grouped", [0, 1])):
        layout = layouts[name]
        tokens_E = np.ones(EXPERTS)
        tokens_E[cold] = 0
        scores = Scores(statistics(layout, tokens=tokens_E), ABOUT, "")
        with pytest.raises(InputError, match=r"model\.safetensors: model\.layers\.\d\..*gate\.weight sent no token"):
            choose(layout, scores, "reap", 6)
        assert all(not set(cold) & set(kept) for kept in choose(layout, scores, "frequency", 4).values())
