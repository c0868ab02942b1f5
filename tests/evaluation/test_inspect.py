"""`moectl inspect`: parameters are those of the model as transformers makes it, however it is stored and routed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_models import write_coded
from installed import installed
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError
from moectl.evaluation.inspect import Inspection, inspect
from moectl.families.tiny_moe import tiny_moe
from moectl.integrations.transformers import load
from moectl.layerwise.active import shares_of
from moectl.layerwise.routed import plan_of, routed_plan


def inspected(path: Path) -> Inspection:
    return inspect(Checkpoint.open(path))


def of(found: Inspection, label: str) -> Any:
    return next(part for part in found.components if part.component == label)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    tiny_moe("mixtral", num_hidden_layers=4, num_local_experts=8).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("switch") / "moe"
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4}
    layers = dict.fromkeys(("num_layers", "num_decoder_layers"), 2)
    sparse = dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1)
    SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **layers, **sparse)).save_pretrained(
        path
    )
    return path


ROUTERS = {  # and how many of 8 experts work on a token
    "mixtral:k=3": 3,
    "deepseek-v3:k=2": 2,
    "hash": 1,
    "expert-choice:k=1,capacity_factor=1.5": 1.5,
    "e3:members=2": 2,
    "adaptive-mixtures": 8,
    "remoe:k=2": 2,
    "top-p": None,
}


@pytest.mark.parametrize("router", ROUTERS)
def test_what_a_router_makes_active_is_in_the_plan_and_in_what_it_writes(
    router: str, moe: Path, tmp_path: Path
) -> None:
    active = ROUTERS[router]
    plan = routed_plan(plan_of(Checkpoint.open(moe)), router)
    write(plan, tmp_path / "out")
    found = inspected(tmp_path / "out")
    model = load(tmp_path / "out")
    assert found.parameters == plan.facts["parameters"] == sum(each.numel() for each in model.parameters())
    experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    idle = None if active is None else experts * (8 - active) / 8
    assert found.active_parameters == plan.facts["active_parameters"]
    assert found.active_parameters == (None if idle is None else found.parameters - idle)
    assert (found.experts, found.top_k) == (8, active)


def test_peer_has_single_neurons(moe: Path, tmp_path: Path) -> None:
    """Counted in a pass: a neuron that no head asks for works on no token."""
    write(routed_plan(plan_of(Checkpoint.open(moe)), "peer:heads=2,top_k=3"), tmp_path / "out")
    found, model = inspected(tmp_path / "out"), load(tmp_path / "out").eval()
    seen: list[torch.Tensor] = []
    layers = [module for name, module in model.named_modules() if name.endswith(".experts")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _layer, given: seen.append(given[1]))
    model(torch.tensor([[5]]))
    neurons = layers[0].num_experts
    assert (found.experts, found.top_k) == (neurons, 6) and [len(index_TK[0]) for index_TK in seen] == [6] * 4
    per_neuron = sum(each.numel() for each in layers[0].parameters()) // neurons
    assert of(found, "experts").parameters == 4 * neurons * per_neuron
    assert of(found, "experts").active_parameters == 4 * 6 * per_neuron
    assert found.parameters == sum(each.numel() for each in model.parameters())


def test_depth_leaves_layers_out_and_soft_slots_leave_nothing_out(moe: Path, switch: Path, tmp_path: Path) -> None:
    write(routed_plan(plan_of(Checkpoint.open(moe)), "mod:share=0.25"), tmp_path / "mod")
    plain, found = inspected(moe), inspected(tmp_path / "mod")
    model = load(tmp_path / "mod")
    layer = sum(each.numel() for name, each in model.model.layers[1].named_parameters() if "router" not in name)
    experts = sum(each.numel() for each in model.model.layers[1].mlp.experts.parameters())
    assert plain.active_parameters is not None and found.parameters == sum(each.numel() for each in model.parameters())
    routers = found.parameters - plain.parameters
    assert found.active_parameters == plain.active_parameters + routers - 2 * 0.75 * (layer - experts * 6 / 8)

    plan = routed_plan(plan_of(Checkpoint.open(switch)), "soft-moe")
    write(plan, tmp_path / "soft")
    found, model = inspected(tmp_path / "soft"), load(tmp_path / "soft")
    decoder = sum(each.numel() for name, each in model.named_parameters() if "decoder" in name and ".experts." in name)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert found.active_parameters == plan.facts["active_parameters"] == found.parameters - decoder * 3 // 4


def test_coded_and_plain_models_have_the_same_parameters(tmp_path: Path) -> None:
    coded = inspected(write_coded(tiny_moe("qwen3_moe"), tmp_path, flip=True))
    plain = inspected(tmp_path / "plain")
    assert (coded.parameters, coded.active_parameters) == (plain.parameters, plain.active_parameters)
    assert sum(coded.dtypes.values()) != coded.parameters
    for one, other in zip(coded.components, plain.components, strict=True):
        assert (one.component, one.parameters) == (other.component, other.parameters)
        assert other.bits_per_parameter == 32
    experts = of(coded, "experts")
    assert experts.bits_per_parameter == 8 * experts.bytes / experts.parameters < 32
    assert coded.bits_per_parameter == 8 * coded.bytes / coded.parameters


QUANTISED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {
            "qweight": torch.zeros(8, 48, dtype=torch.int32),
            "qzeros": torch.zeros(2, 6, dtype=torch.int32),
            "scales": torch.zeros(2, 48, dtype=torch.float16),
            "g_idx": torch.zeros(64, dtype=torch.int32),
        },
    ),
    "awq of 8 bits": (
        {"quant_method": "awq", "bits": 8},
        {
            "qweight": torch.zeros(64, 12, dtype=torch.int32),
            "qzeros": torch.zeros(2, 12, dtype=torch.int32),
            "scales": torch.zeros(2, 48, dtype=torch.float16),
        },
    ),
    "compressed-tensors, NVFP4": (
        {"quant_method": "compressed-tensors"},
        {
            "weight_packed": torch.zeros(48, 32, dtype=torch.uint8),
            "weight_scale": torch.zeros(48, 4, dtype=torch.float8_e4m3fn),
            "weight_global_scale": torch.zeros(1),
            "input_global_scale": torch.zeros(1),
        },
    ),
    "compressed-tensors, 4 bits in a ragged row": (
        {"quant_method": "compressed-tensors"},
        {
            "weight_packed": torch.zeros(3, 129, dtype=torch.int32),
            "weight_scale": torch.zeros(3, 1),
            "weight_shape": torch.tensor([3, 1024]),
        },
    ),
    "fp8": (
        {"quant_method": "fp8"},
        {"weight": torch.zeros(48, 64, dtype=torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)},
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {"x_blocks": torch.zeros(48, 2, 16, dtype=torch.uint8), "x_scales": torch.zeros(48, 2, dtype=torch.uint8)},
    ),
    "modelopt, NVFP4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": torch.zeros(48, 32, dtype=torch.uint8),
            "weight_scale": torch.zeros(48, 4, dtype=torch.float8_e4m3fn),
            "weight_scale_2": torch.zeros(()),
            "input_scale": torch.zeros(()),
        },
    ),
    "bitsandbytes of 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {
            "weight": torch.zeros(48, 64, dtype=torch.int8),
            "SCB": torch.zeros(48),
            "weight_format": torch.zeros((), dtype=torch.uint8),
        },
    ),
    "bitsandbytes of 4 bits": (
        {"quant_method": "bitsandbytes"},
        {
            "weight": torch.zeros(48 * 32, 1, dtype=torch.uint8),
            "weight.absmax": torch.zeros(48),
            "weight.quant_map": torch.zeros(16),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
        },
    ),
}


@pytest.mark.parametrize("way", QUANTISED)
def test_a_matrix_of_3072_is_one_however_it_is_quantised(way: str, tmp_path: Path) -> None:
    stated, tensors = QUANTISED[way]
    named = {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in tensors.items()}
    save_file({**named, "model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stated}))
    found = inspected(tmp_path)
    assert of(found, "dense FFN").parameters == 3072 and found.parameters == 3072 + 64
    assert of(found, "dense FFN").bytes == sum(tensor.nbytes for tensor in tensors.values())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert way == "fp8" or inspected(tmp_path).parameters != 3072 + 64, (
        "the planted error: nothing says it is quantised"
    )


@pytest.mark.parametrize(
    "family", installed("deepseek_v3", "gemma4_text", "gpt_oss", "jetmoe", "muse_spark_text", "qwen2_moe")
)
def test_families_name_their_experts_in_many_ways(family: str, tmp_path: Path) -> None:
    """Experts are all that has a first dimension for them, routers apart; two of eight work."""
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    found = inspected(tmp_path)
    stacked = [value for name, value in model.named_parameters() if value.ndim == 3 or name.endswith("_proj_bias")]
    state = sum(value.numel() for name, value in model.named_buffers() if name in model.state_dict())
    assert found.parameters == sum(value.numel() for value in model.parameters()) + state
    idle = sum(value.numel() for value in stacked if len(value) == 8) * 6 // 8
    assert found.active_parameters == pytest.approx(found.parameters - idle, rel=3e-3)


def test_choices_that_compute_nothing_are_not_counted() -> None:
    longcat = {"model_type": "longcat_flash", "n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12}
    assert shares_of(longcat, {}).active == 8


def test_a_config_of_feed_forward_layers_says_how_many_experts_there_are() -> None:
    dbrx = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}
    assert (shares_of(dbrx, {}).experts, shares_of(dbrx, {}).active) == (16, 4)


@pytest.mark.parametrize(
    "router",
    [
        *({}, "switch", {"name": "hash"}, {"name": "nobody", "options": {}}, {"name": "mot", "options": {}}),
        *({"name": "switch", "options": {"top_q": 1}}, {"name": "peer", "options": {"heads": "x"}}),
        *({"name": "mod", "options": {"share": "x"}}, {"name": "e3", "options": {"members": 0}}),
    ],
)
def test_a_router_that_cannot_be_is_an_error_of_the_input(router: Any, moe: Path, tmp_path: Path) -> None:
    config = json.loads((moe / "config.json").read_text())
    tmp_path.joinpath("config.json").write_text(
        json.dumps({"model_type": "moectl_routed", "base_config": config, "router": router})
    )
    save_file(load_file(moe / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="names a router that cannot be made"):
        inspected(tmp_path)
