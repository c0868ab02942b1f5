"""A packed model computes the same, holds its weights once, and never leaves a checkpoint without them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed
from torch import Tensor

from moectl.errors import InputError
from moectl.families.tiny_moe import tiny_inputs, tiny_moe
from moectl.integrations.transformers import pack, unpack

FAMILIES = installed("mixtral", "gpt_oss", "nemotron_h", "inkling2_text", "deepseek_v4", "aria_text")


def frozen(model_type: str) -> Any:
    """A tiny model as it is used for inference."""
    model = tiny_moe(model_type)
    model.set_experts_implementation("moectl")
    return model.requires_grad_(False)


def weights(model: Any) -> dict[str, Tensor]:
    """The matrices of the experts by name."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_equals_unpacked_and_comes_back_bit_for_bit(model_type: str) -> None:
    model = frozen(model_type)
    expected = model(**tiny_inputs(model))[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack(model)
    found = model(**tiny_inputs(model))[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    unpack(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].stride() == tensor.stride() for name, tensor in before.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(**tiny_inputs(model))[0], expected)


def test_weights_are_held_once() -> None:
    model = frozen("mixtral")
    originals = weights(model)
    nbytes = sum(tensor.nbytes for tensor in originals.values())
    alive = [weakref.ref(tensor) for tensor in originals.values()]
    originals.clear()
    packed = pack(model)
    assert nbytes <= packed <= 1.1 * nbytes
    assert not weights(model) and not any(reference() is not None for reference in alive)
    assert pack(model) == packed, "packing twice changes nothing"


def test_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    model = frozen("mixtral")
    pack(model)
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path / "model")):
        with pytest.raises(InputError, match="packed") as refused:
            save()
        assert "unpack" in refused.value.fix
    assert not list(tmp_path.glob("**/*.safetensors"))
    unpack(model)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_packed_is_refused_and_left_alone() -> None:
    trained = frozen("mixtral").train()
    learning = frozen("mixtral").requires_grad_()
    normed = [(frozen(each), "norm") for each in installed("muse_spark_text")]
    double = frozen("mixtral").double()
    for model, reason in ((trained, "training"), (learning, "gradients"), *normed, (double, "packed")):
        before = len(weights(model))
        with pytest.raises(InputError, match=reason):
            pack(model)
        assert len(weights(model)) == before
    with pytest.raises(InputError, match="no experts"):
        pack(tiny_moe("dbrx"))


def test_a_packed_layer_has_no_backward() -> None:
    model = frozen("mixtral")
    pack(model)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(InputError, match="packed"):
        model(**tiny_inputs(model))
    with torch.no_grad():
        model(**tiny_inputs(model))
