"""Read a dense config as transformers would, and translate it for a pair, field by field from a whitelist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moectl.errors import InputError
from moectl.families.fields import check_fields, check_json
from moectl.families.spec import Config, DenseFamily, MoeFamily, Pair
from moectl.text import shown

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LARGEST = {"vocab_size": 2**32, "num_hidden_layers": 100_000}


def normalised(family: DenseFamily, config: Config) -> dict[str, Any]:
    """A dense config with every default filled in and legacy spellings replaced.

    Adds what tensors depend on: `untied_head`, `qkv_bias`, `o_bias`, `mlp_bias`, and what the family derives.

    Raises:
        InputError: a size is missing or absurd, or the checkpoint is quantised.
    """
    if config.get("quantization_config"):
        raise _bad("has a quantization_config", "Give the unquantised checkpoint (bfloat16, float16 or float32).")
    result = {**family.defaults, **config}
    result |= {ours: config.get(ours, result[theirs]) for ours, theirs in family.names.items()}
    for name in _SIZES:
        _check_size(name, result.get(name))
    check_fields(result, family.defaults)
    heads, hidden = result["num_attention_heads"], result["hidden_size"]
    result["num_key_value_heads"] = result.get("num_key_value_heads") or heads
    _check_size("num_key_value_heads", result["num_key_value_heads"])
    result["head_dim"] = result.get("head_dim") or hidden // heads
    _check_size("head_dim", result["head_dim"])
    result["dtype"] = config.get("dtype") or config.get("torch_dtype")
    result.pop("rope_scaling", None)  # null in many a config.json
    result |= _rope(config, family)
    result |= family.derive(result)
    result["untied_head"] = not result["tie_word_embeddings"]
    result["qkv_bias"] = result.get("qkv_bias", result.get("attention_bias", False))
    result["o_bias"] = result.get("attention_bias", False)
    result["mlp_bias"] = result.get("mlp_bias", False)
    return result


def translated(
    pair: Pair, dense: Config, moe: MoeFamily, fields: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
    """The MoE config of a normalised dense config; `fields` are num_experts, top_k, expert_width, ... by meaning.

    Raises:
        InputError: the MoE family cannot hold something the dense config says.
    """
    for reason in filter(None, (check(dense) for check in pair.refuse)):
        raise InputError(
            f"config.json: {reason}.",
            f"{pair.dense} -> {pair.moe} would not compute the same function.",
            "Choose another family with --into, or change the dense model.",
        )
    kept = {name: dense[name] for name in pair.keep if name in dense}
    named = {moe.fields[meaning]: value for meaning, value in fields.items() if meaning in moe.fields}
    layers = {moe.dense_layers: fields["dense_layers"]} if moe.dense_layers else {}
    config = kept | pair.translate(dense) | dict(moe.values) | named | layers
    config["dtype"] = dtype or dense["dtype"]
    check_json(config)
    return {"architectures": [moe.architecture], "model_type": moe.model_type, **config}


def _rope(config: Config, family: DenseFamily) -> dict[str, Any]:
    """Rotary parameters in both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling`.

    Readers before transformers 5 (older vLLM, llama.cpp) know only the latter; transformers 5 accepts both.
    """
    stated = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    stated = dict(stated.get("full_attention") or stated)
    theta = stated.pop("rope_theta", None) or config.get("rope_theta") or family.rope_theta
    kind = stated.get("rope_type") or stated.get("type") or "default"
    parameters = {**stated, "rope_type": kind}
    if family.partial_rotary_factor is not None:
        parameters.setdefault(
            "partial_rotary_factor", config.get("partial_rotary_factor") or family.partial_rotary_factor
        )
    result: dict[str, Any] = {"rope_parameters": {**parameters, "rope_theta": theta}, "rope_theta": theta}
    return result | ({} if kind == "default" else {"rope_scaling": parameters})


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 0 < value < _LARGEST.get(name, 2**31):
        raise _bad(
            f"has {name} = {shown(repr(value))}, expected a positive integer", "Repair the config or fetch it again."
        )


def _bad(what: str, fix: str) -> InputError:
    return InputError(f"config.json {what}.", "The weights cannot be read as this says.", fix)
