"""PESC layers: the dense model bit for bit at the start, the paper's formula and its gradients after."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from pesc_models import EXPERTS, GATED, Reference, adapted, config, layers_of, off, randomised, tokens
from torch import nn

from moectl.errors import InputError
from moectl.families.registry import DENSE
from moectl.families.tiny import tiny_model

TOLERANCE = 2e-5


@pytest.mark.parametrize("model_type", GATED)
def test_an_untrained_adapter_leaves_every_bit_of_the_logits(model_type):
    dense = tiny_model(model_type)
    wanted = dense(tokens()).logits
    model = get_peft_model(dense, config())
    assert len(layers_of(model)) == dense.config.num_hidden_layers
    assert torch.equal(model(input_ids=tokens()).logits, wanted)


def test_an_untrained_adapter_leaves_every_bit_in_bfloat16_and_under_autocast():
    dense = tiny_model("llama").bfloat16()
    wanted = dense(tokens()).logits
    model = get_peft_model(dense, config())
    assert model.get_submodule("base_model.model.model.layers.0.mlp").pesc_down["default"].dtype == torch.float32
    assert torch.equal(model(input_ids=tokens()).logits, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        dense = tiny_model("llama")
        wanted = dense(tokens()).logits
        assert torch.equal(get_peft_model(dense, config())(input_ids=tokens()).logits, wanted)


@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_logits_and_gradients_match_the_formula_in_float64(top_k):
    model = adapted(top_k=top_k, scale=0.7, aux_loss_coef=0.0)
    reference = Reference(model)
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    wanted = reference.dense(input_ids=ids, labels=ids)
    assert off(out.logits, wanted.logits) < TOLERANCE
    out.loss.backward()
    wanted.loss.backward()
    for index, layer in enumerate(layers_of(model)):
        for name in ("router", "down", "up"):
            gradient = getattr(layer, f"pesc_{name}")["default"].grad
            expected = reference.weights[f"{index}.{name}"].grad
            if top_k == 1 and name == "router":
                assert not gradient.any() and not expected.any()  # the softmax over one choice is 1
            else:
                assert off(gradient, expected) < TOLERANCE, (index, name)


@pytest.mark.parametrize("planted", ["softmax before top-k", "router on the output", "adapter on the input"])
def test_a_planted_error_is_far_outside_the_tolerance(planted):
    model = adapted()
    out = model(input_ids=tokens()).logits
    assert off(out, Reference(model).dense(tokens()).logits) < TOLERANCE
    assert off(out, Reference(model, planted).dense(tokens()).logits) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "phi3", "lfm2"])
def test_other_families_match_the_formula_too(model_type):
    model = adapted(model_type)
    assert off(model(input_ids=tokens()).logits, Reference(model).dense(tokens()).logits) < TOLERANCE


def test_only_the_adapters_learn_and_all_of_them_do():
    model = adapted().train()
    model(input_ids=tokens(4, 32), labels=tokens(4, 32)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("pesc_" in name)
        if "pesc_" in name:  # every expert of every layer got some tokens
            assert all(part.any() for part in parameter.grad), name


def test_routing_under_autocast_stays_that_of_float32():
    layer = layers_of(adapted())[0]
    x = torch.randn(64, 64)
    seen = []
    for enabled in (False, True):
        layer.recorder.routings = seen
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x)
    assert torch.equal(seen[0].logits_TE, seen[1].logits_TE)


def test_dropout_is_for_training_alone():
    plain, model = adapted(), adapted(adapter_dropout=0.5)
    ids = tokens()
    assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
    assert not torch.equal(model.train()(input_ids=ids).logits, plain.train()(input_ids=ids).logits)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    ids = tokens()
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
        assert len(model.aux_losses()) == 3  # the second run of the layers left nothing behind
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(plain, again) for plain, again in zip(found[0][1], found[1][1], strict=True))


def test_reentrant_checkpointing_would_lose_the_balancing_loss_and_is_refused():
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="lost its way to the routers"):
        model(input_ids=tokens(), labels=tokens())


def test_generation_is_greedy_decoding_of_the_adapted_model():
    model = adapted().eval()
    ids = tokens(1, 5)
    made = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(6):
        ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, ids)


def test_a_family_without_an_entry_is_found_by_the_names_of_its_parts():
    assert "gemma2" not in DENSE
    model = randomised(get_peft_model(tiny_model("gemma2", head_dim=16), config()))
    assert len(layers_of(model)) == 3


@pytest.mark.parametrize(
    ("model_type", "targets", "message"),
    [
        ("mixtral", None, "has no gated FFN"),
        ("t5", None, "has no gated FFN"),
        ("llama", ["self_attn.q_proj"], "is not an FFN"),
        ("llama", ["gate_proj"], "is not an FFN"),
    ],
)
def test_what_is_no_ffn_is_refused(model_type, targets, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(tiny_model(model_type), config(target_modules=targets))


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 0}, {"top_k": 5}, {"adapter_dim": 0}, {"adapter_dropout": 1.0}, {"aux_loss_coef": -1.0}],
)
def test_a_value_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_an_ffn_of_quantised_linear_layers_gets_adapters_of_the_type_it_computes_in():
    """Packed integers as weights and a `compute_dtype`, which is all that is known of bitsandbytes' 4-bit layers."""

    class Packed(nn.Module):
        def __init__(self, rows, columns):
            super().__init__()
            self.in_features, self.out_features, self.compute_dtype = columns, rows, torch.bfloat16
            self.weight = nn.Parameter(torch.zeros(rows * columns // 2, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x.new_ones(*x.shape[:-1], self.out_features)

    dense = tiny_model("llama")
    for layer in dense.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            setattr(layer.mlp, name, Packed(old.out_features, old.in_features))
    model = get_peft_model(dense, config(), autocast_adapter_dtype=False)
    assert {layer.pesc_up["default"].dtype for layer in layers_of(model)} == {torch.bfloat16}
    assert torch.isfinite(model(input_ids=tokens(), labels=tokens()).loss)
