"""Routers are found and watched in every kind of family; every parameter has the role its name says."""

from __future__ import annotations

import pytest
import torch
from installed import installed

from moectl.errors import InputError
from moectl.families.releases import RECORDS
from moectl.families.tiny import tiny_model
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.training import parameters
from moectl.training.metrics import flops_per_token, load_cv, max_vio
from moectl.training.routers import RouterWatch, moe_blocks

FAMILIES = [
    *("mixtral", "qwen3_moe", "ernie4_5_moe"),
    *installed("deepseek_v3", "lfm2_moe", "hunyuan_v1_moe", "granitemoe", since=RECORDS),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loads_are_those_of_the_model(family: str) -> None:
    """Logits are the router's input times its weight, computed apart; loads are counted from the experts' arguments."""
    model = tiny_moe(family)
    blocks = moe_blocks(model)
    watch = RouterWatch(blocks)
    seen: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    for block in blocks:
        block.router.register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach().clone()))
        block.experts.register_forward_pre_hook(lambda _m, given: chosen.append(given[1]))
    model(**tiny_inputs(model))
    logits, load = watch.take()
    assert len(logits) == len(load) == len(seen) >= 2
    for block, given, found, choices, counts in zip(blocks, seen, logits, chosen, load, strict=True):
        weight = next(p for p in block.router.parameters() if p.ndim == 2 and len(p) == block.num_experts)
        expected = given.reshape(-1, given.shape[-1]).double() @ weight.double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert found.requires_grad, "the losses reach the router through it"
        assert counts.tolist() == [(choices == expert).sum().item() for expert in range(block.num_experts)]
    has_bias = {"deepseek_v3", "lfm2_moe", "ernie4_5_moe"}
    assert all((block.bias is not None) == (family in has_bias) for block in blocks)


def test_a_dense_model_has_none() -> None:
    assert moe_blocks(tiny_model("llama")) == []


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe", *installed("deepseek_v3", since=RECORDS)])
def test_only_trains_what_it_says(family: str) -> None:
    model = tiny_moe(family)
    blocks = moe_blocks(model)
    names = {name for name, _ in model.named_parameters() if not name.endswith("e_score_correction_bias")}
    experts = {name for name in names if ".experts." in name}
    routers = {name for name in names if ".gate." in name}
    attention = {name for name in names if ".self_attn." in name}
    expected = {
        ("all", False): names,
        ("all", True): names - experts,
        ("router", False): routers,
        ("experts", False): experts,
        ("attention+router", False): attention | routers,
    }
    for (only, freeze), wanted in expected.items():
        count = parameters.select(model, blocks, only=only, freeze_experts=freeze)
        assert trained(model) == wanted and count == sum(model.get_parameter(name).numel() for name in wanted)
    groups = parameters.groups(model, blocks, learning_rate=1.0, router_rate=2.0, weight_decay=0.5)
    rates = {(group["name"], group["lr"]) for group in groups}
    assert rates == {("model", 1.0), ("router", 2.0)}
    assert all((group["weight_decay"] > 0) == (group["params"][0].ndim >= 2) for group in groups)


def test_nothing_left_to_train_is_refused() -> None:
    dense, moe = tiny_model("llama"), tiny_moe("mixtral")
    with pytest.raises(InputError, match="nothing to train"):
        parameters.select(dense, [], only="router", freeze_experts=False)
    with pytest.raises(InputError, match="nothing to train"):
        parameters.select(moe, moe_blocks(moe), only="experts", freeze_experts=True)


def test_load_measures() -> None:
    assert load_cv(torch.tensor([5, 5, 5, 5])) == max_vio(torch.tensor([5, 5, 5, 5])) == 0
    assert load_cv(torch.tensor([20, 0, 0, 0])) == pytest.approx(3**0.5)
    assert max_vio(torch.tensor([20, 0, 0, 0])) == pytest.approx(3)


def test_flops_count_the_active_weights() -> None:
    """For a Mixtral: 6 x (attention + norms + router + K experts + head) + attention's products."""
    model = tiny_moe("mixtral")
    hidden, width, layers, vocabulary = 64, 96, 3, 96
    per_layer = 2 * hidden * 64 + 2 * hidden * 32 + 2 * hidden + 8 * hidden + 2 * 3 * hidden * width
    weights = layers * per_layer + hidden + vocabulary * hidden
    assert flops_per_token(model, moe_blocks(model), 2, 50) == 6 * weights + 12 * layers * 64 * 50
