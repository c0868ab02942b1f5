"""A checkpoint run layer by layer is the same function as the one transformers loads whole."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import INDEX, SINGLE, Checkpoint
from moectl.errors import InputError, MachineError
from moectl.layerwise import tensors
from moectl.layerwise.model import LayerCall, LayerwiseModel
from moectl.layerwise.quiet import quiet

LENGTH = 48
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def rope(kind: str, **values: float) -> dict[str, Any]:
    """Rotary embeddings stretched fourfold from 32 positions, so that 48 tokens leave the original range."""
    stretched = {"factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **stretched, **values}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama llama3 rope": ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama yarn rope": ("llama", rope("yarn")),
    "llama linear rope": ("llama", rope("linear")),
    "llama dynamic rope": ("llama", rope("dynamic") | {"max_position_embeddings": 32}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 16, "layer_types": WINDOWED}),
    "mixtral": ("mixtral", LOCAL_EXPERTS),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe, first layer dense": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [0]}),
    "gpt_oss": ("gpt_oss", LOCAL_EXPERTS | {"head_dim": 8, "sliding_window": 16, "layer_types": WINDOWED}),
    "deepseek_v3": (
        "deepseek_v3",
        EXPERTS | MLA | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    "llama4": (
        "llama4_text",
        LOCAL_EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    ),
}


def make(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny random checkpoint at `path`, in several shards, with norms and biases random too."""
    model_type, values = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SMALL | values | changes))
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        model.save_pretrained(path, max_shard_size="50KB")
    return path


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Apply `change` to the tensors of a checkpoint, which becomes a single file."""
    files = sorted(path.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    change(tensors)
    for old in (*files, path / INDEX):
        old.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / SINGLE, {"format": "pt"})
    return path


def whole(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def opened(path: Path, dtype: torch.dtype = torch.float32) -> LayerwiseModel:
    return LayerwiseModel.open(Checkpoint.open(path), dtype)


def token_ids(batch: int = 2) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def in_memory(module: torch.nn.Module) -> bool:
    return any(parameter.untyped_storage().nbytes() >= parameter.nbytes for parameter in module.parameters())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    path = make(tmp_path, family)
    reference, model = whole(path), opened(path)
    assert_close(model.logits(token_ids()), logits_of(reference))
    buffers = dict(model.model.named_buffers())
    for name, expected in reference.named_buffers():
        if buffers[name].untyped_storage().nbytes() >= expected.nbytes:  # the unsaved ones: saved ones come and go
            assert torch.equal(buffers[name], expected), name


def test_a_tied_head_may_be_stored_under_either_name(tmp_path: Path) -> None:
    path = make(tmp_path, "llama tied")
    expected = logits_of(whole(path))
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert_close(opened(path).logits(token_ids()), expected)


def test_a_head_stored_beside_the_embedding_it_is_tied_to_counts(tmp_path: Path) -> None:
    path = make(tmp_path, "llama tied")
    head = torch.randn(SMALL["vocab_size"], SMALL["hidden_size"])
    edit(path, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert_close(opened(path).logits(token_ids()), logits_of(whole(path)))


def test_bfloat16_computes_what_bfloat16_computes(mixtral: Path) -> None:
    logits = opened(mixtral, torch.bfloat16).logits(token_ids())
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, logits_of(whole(mixtral, torch.bfloat16)))


def test_only_the_layer_at_its_turn_has_weights(mixtral: Path) -> None:
    model = opened(mixtral)
    layers, around = model.model.model.layers, (model.model.model.embed_tokens, model.model.lm_head)
    turns = []

    def visit(call: LayerCall) -> Tensor:
        assert call.module is layers[call.index]
        assert [in_memory(layer) for layer in layers] == [index == call.index for index in range(len(layers))]
        assert not any(in_memory(module) for module in around)
        turns.append(call.index)
        return call.run()

    assert_close(model.logits(token_ids(), visit), logits_of(whole(mixtral)))
    assert turns == list(range(model.num_layers))
    assert not in_memory(model.model)


def test_a_visitor_sees_and_changes_what_passes(mixtral: Path) -> None:
    """Weights changed in the visitor act as if they had been stored; hooks on submodules see the whole batch."""
    reference, routed = whole(mixtral), []
    with torch.no_grad():
        reference.model.layers[1].mlp.experts.down_proj.mul_(0.5)

    def visit(call: LayerCall) -> Tensor:
        assert call.hidden_states.shape == (2, LENGTH, SMALL["hidden_size"])
        if call.index == 1:
            before = call.run()
            call.module.mlp.experts.down_proj.mul_(0.5)
            assert not torch.equal(call.run(), before)
        hook = call.module.mlp.gate.register_forward_hook(lambda *_: routed.append(call.index))
        output = call.run()
        hook.remove()
        return output

    model = opened(mixtral)
    assert_close(model.logits(token_ids(), visit), logits_of(reference))
    assert routed == [0, 1, 2]
    assert_close(model.logits(token_ids()), logits_of(whole(mixtral)))


def test_run_gives_final_hidden_states_and_spares_the_head(llama: Path) -> None:
    model = opened(llama)
    model.model.lm_head.forward = pytest.fail
    with torch.no_grad():
        expected = whole(llama).model(token_ids()).last_hidden_state
    assert_close(model.run(token_ids()), expected)


def test_weights_read_out_of_turn_show(llama: Path) -> None:
    assert opened(llama).model.lm_head.weight.isnan().all()


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop("model.norm.weight"), "no tensor for 'model.norm.weight'"),
    "missing expert": (
        lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        "no 'model.layers.1.block_sparse_moe.experts.2.w3.weight'",
    ),
    "one expert less": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.2" in name and "experts.3" in name],
        "'model.layers.2.mlp.experts.",
    ),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(2)), "'extra', for which"),
    "misshapen": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}),
        "'model.norm.weight' [7], but its config.json [32]",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(tmp_path: Path, mixtral: Path, misfit: str) -> None:
    change, message = MISFITS[misfit]
    path = edit(Path(shutil.copytree(mixtral, tmp_path / "model")), change)
    with pytest.raises(InputError) as caught:
        opened(path)
    assert message in caught.value.what


def test_a_file_cut_while_in_use_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = edit(make(tmp_path), lambda tensors: None)
    model = opened(path)
    last = max(model.checkpoint.tensors.values(), key=lambda ref: ref.offset)
    with (path / SINGLE).open("r+b") as file:
        file.truncate(last.offset + 4)
    with pytest.raises(InputError) as caught:
        model.logits(token_ids())
    assert repr(last.name) in caught.value.what
    assert not in_memory(model.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
        ({"model_type": "nosuchmodel"}, "cannot use"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"hidden_size": 0, "head_dim": None, "num_attention_heads": 0}, "transformers can"),
    ],
)
def test_models_that_cannot_run_are_refused(tmp_path: Path, llama: Path, changes: dict[str, Any], message: str) -> None:
    path = Path(shutil.copytree(llama, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        opened(path)
    assert message in caught.value.what


def test_quiet_restores_what_it_silences() -> None:
    bars, verbosity, filters = logging.is_progress_bar_enabled(), logging.get_verbosity(), list(warnings.filters)
    with quiet():
        assert not logging.is_progress_bar_enabled()
        warnings.warn("unheard", stacklevel=1)
    after = logging.is_progress_bar_enabled(), logging.get_verbosity(), list(warnings.filters)
    assert after == (bars, verbosity, filters)


@pytest.mark.parametrize("kind", ["experts", "embed_tokens"])
def test_memory_that_ends_while_weights_are_read_is_the_machines_fault(
    mixtral: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers catches every error of a conversion; this one says nothing about the checkpoint."""
    model = opened(mixtral)
    read = tensors.read_tensor

    def full(ref: TensorRef) -> Tensor:
        if kind in ref.name:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8.")
        return read(ref)

    monkeypatch.setattr(tensors, "read_tensor", full)
    with pytest.raises(MachineError, match="Memory ended while weights of"):
        model.logits(token_ids())
