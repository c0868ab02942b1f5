"""PESC among PEFT's own tools: saving, loading, listing, switching, disabling, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from pesc_models import EXPERTS, WIDTH, adapted, layers_of, tokens, twin
from safetensors.torch import load_file

from moectl.errors import InputError
from moectl.families.tiny import tiny_model
from moectl.integrations.pesc import PescConfig

HIDDEN = 64
LORA = {"lora_r": 4, "lora_target_modules": ["q_proj", "gate_proj", "down_proj"]}


def test_saved_and_loaded_again_the_logits_are_identical(tmp_path):
    model = adapted(scale=0.5).eval()
    wanted = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(again(input_ids=tokens()).logits, wanted)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    lean = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(lean(input_ids=tokens()).logits, wanted)
    to_train = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert {name.split(".")[-2] for name, p in to_train.named_parameters() if p.requires_grad} == {
        "pesc_router",
        "pesc_down",
        "pesc_up",
    }


def test_the_files_hold_what_was_asked_for(tmp_path):
    adapted(scale=0.5).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {
        "pesc_router": (EXPERTS, HIDDEN),
        "pesc_down": (EXPERTS, WIDTH, HIDDEN),
        "pesc_up": (EXPERTS, HIDDEN, WIDTH),
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.mlp.{name}": shape
        for layer in range(3)
        for name, shape in shapes.items()
    }
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["num_experts"], stated["scale"]) == ("PESC", EXPERTS, 0.5)


def test_pefts_own_tools_list_it(tmp_path, capsys):
    model = adapted()
    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, PescConfig)
    assert (read.peft_type, read.task_type) == (PeftType.PESC, TaskType.CAUSAL_LM)
    assert PeftType("PESC") is PeftType.PESC and "PESC" in list(PeftType)
    assert model.peft_config["default"].peft_type is PeftType.PESC
    model.print_trainable_parameters()
    parameters = 3 * (EXPERTS * HIDDEN + 2 * EXPERTS * WIDTH * HIDDEN)
    assert f"trainable params: {parameters:,} ||" in capsys.readouterr().out
    assert sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values()) == parameters
    status = get_model_status(model)
    assert (status.peft_types, status.trainable_params) == ({"default": "PESC"}, parameters)


def test_adapters_switch_add_up_and_disappear(tmp_path):
    ids = tokens()
    dense = tiny_model("llama")(ids).logits
    first = adapted().eval()
    first_logits = first(input_ids=ids).logits
    other = adapted(seed=1, num_experts=3, top_k=1, adapter_dim=5).eval()
    other_logits = other(input_ids=ids).logits
    other.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "other")
    assert torch.equal(first(input_ids=ids).logits, first_logits)
    first.set_adapter("other")
    assert torch.equal(first(input_ids=ids).logits, other_logits)
    with first.disable_adapter():
        assert torch.equal(first(input_ids=ids).logits, dense)
    assert torch.equal(first(input_ids=ids).logits, other_logits)
    first.base_model.set_adapter(["default", "other"])
    layer = layers_of(first)[0]
    x = torch.randn(7, HIDDEN)
    parts = []
    for name in ("default", "other"):
        layer.set_adapter(name)
        parts.append(layer(x) - layer.base_layer(x))
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + parts[0] + parts[1])
    first.set_adapter("default")
    first.delete_adapter("other")
    assert torch.equal(first(input_ids=ids).logits, first_logits)
    assert list(layer.pesc_up) == ["default"]


def test_layers_can_be_chosen(tmp_path):
    model = adapted(layers_to_transform=[0, 2]).eval()
    assert [name for name, module in model.named_modules() if type(module).__name__ == "PescLayer"] == [
        "base_model.model.model.layers.0.mlp",
        "base_model.model.model.layers.2.mlp",
    ]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_merging_is_refused_and_leaves_the_model_as_it_was():
    model = adapted()
    wanted = model(input_ids=tokens()).logits
    for merge in (model.merge_and_unload, model.merge_adapter, layers_of(model)[0].merge):
        with pytest.raises(InputError, match="cannot be merged") as refused:
            merge()
        assert "each token chooses its own" in refused.value.why
    assert torch.equal(model(input_ids=tokens()).logits, wanted)


@pytest.mark.parametrize("lora", [{}, LORA])
def test_unloading_gives_the_dense_model_back(lora):
    dense = adapted(**lora).unload().train()
    ids = tokens()
    wanted = tiny_model("llama").train()(input_ids=ids, labels=ids)
    found = dense(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    assert not dense._forward_hooks and not dense._forward_pre_hooks
    assert [name for name, _ in dense.named_modules()] == [name for name, _ in tiny_model("llama").named_modules()]


def test_an_adapter_of_another_size_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_dim": WIDTH * 2}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_a_copy_keeps_its_own_routing():
    model = adapted().train()
    other = twin(model)
    other(input_ids=tokens(), labels=tokens())
    assert len(other.aux_losses()) == 3
    with pytest.raises(InputError, match="no routing"):
        model.aux_losses()


def with_lora(seed=0, **changes):
    """An adapter with LoRA in and beside the FFNs, all of it with values that count."""
    model = adapted(seed=seed, **{**LORA, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_lora_is_trained_beside_the_adapters_and_starts_without_effect():
    ids = tokens()
    wanted = tiny_model("llama")(ids).logits
    model = adapted(trained=False, **LORA)
    assert torch.equal(model(input_ids=ids).logits, wanted)
    with_lora().train()(input_ids=ids, labels=ids).loss.backward()
    model = with_lora().train()
    model(input_ids=ids, labels=ids).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learning
    kinds = [sum(kind in name for name in learning) for kind in ("lora_", "pesc_")]
    assert kinds == [3 * 3 * 2, 3 * 3] and len(learning) == sum(kinds)
    assert any("mlp.base_layer.down_proj.lora_B" in name for name in learning)


def test_what_lora_computes_is_what_it_computes_alone():
    """With W_up zero, the model is the one that PEFT makes of the same LoRA without PESC."""
    both = with_lora()
    alone = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, lora_alpha=16, target_modules=LORA["lora_target_modules"])
    )
    values = {
        name.replace(".base_layer.down", ".down").replace(".base_layer.gate", ".gate"): p
        for name, p in both.named_parameters()
    }
    with torch.no_grad():
        for layer in layers_of(both):
            layer.pesc_up["default"].zero_()
        for name, parameter in alone.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[name])
    assert torch.equal(both(input_ids=tokens()).logits, alone(input_ids=tokens()).logits)


def test_lora_is_saved_switched_and_disabled_with_its_adapter(tmp_path):
    ids = tokens()
    first, second = with_lora().eval(), with_lora(seed=1, lora_target_modules="all-linear").eval()
    plain = adapted(seed=2).eval()
    logits = [model(input_ids=ids).logits for model in (first, second, plain)]
    for name, model in (("first", first), ("second", second), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "first", adapter_name="first")
    again.load_adapter(tmp_path / "plain", "plain")
    again.load_adapter(tmp_path / "second", "second")
    for name, wanted in zip(("first", "second", "plain"), logits, strict=True):
        again.set_adapter(name)
        assert torch.equal(again(input_ids=ids).logits, wanted), name
    with again.disable_adapter():
        assert torch.equal(again(input_ids=ids).logits, tiny_model("llama")(ids).logits)
    assert {name: type(each) for name, each in again.peft_config.items()} == dict.fromkeys(
        ("first", "plain", "second"), PescConfig
    )


def test_only_its_own_import_registers_it():
    program = (
        "import sys, moectl.integrations.transformers; assert 'moectl.integrations.pesc' not in sys.modules;"
        "import peft; assert 'PESC' not in list(peft.PeftType);"
        "import moectl.integrations.pesc; assert 'PESC' in list(peft.PeftType)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
