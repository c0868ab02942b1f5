"""Check that the fields of a config.json are of the kind their name promises, before anything is computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from moectl.errors import InputError
from moectl.families.spec import Config
from moectl.text import shown

_NULLABLE = {"num_key_value_heads", "head_dim", "sliding_window", "use_cache", "block_ffn_dim_multiplier"}
_TOKENS = {"decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "eod_token_id"}
_COUNTS = {"sliding_window", "block_ff_dim", "sliding_window_pattern", "full_attention_interval", "num_decoder_layers"}
_NUMBERS = {"rope_theta", "partial_rotary_factor"}
_FLAGS = {"attention_bias", "mlp_bias", "qkv_bias", "use_bias", "tie_word_embeddings", "tie_embedding"}
_FLAGS |= {"scale_decoder_outputs", "is_gated_act"}
_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "conv")
_LARGEST_COUNT = 2**31


def check_fields(config: Config, defaults: Config) -> None:
    """Compare every field that is used with its kind: that of its default, or of its name where that is null.

    Raises:
        InputError: a field is of another kind, not finite, or out of any sensible range.
    """
    for name in sorted({*defaults, *_COUNTS, *_NUMBERS, *_FLAGS}):
        value, default = config.get(name), defaults.get(name)
        if value is None and (default is None or name in _NULLABLE or name in _TOKENS):
            continue
        if name in _TOKENS:
            whole = value if isinstance(value, list) else [value]
            _require(name, value, all(type(token) is int and abs(token) < 2**63 for token in whole), "token numbers")
        elif name == "layer_types":
            _check_layer_types(name, value, config["num_hidden_layers"])
        elif name == "full_attn_idxs":
            good = isinstance(value, list) and all(type(layer) is int for layer in value)
            _require(name, value, good, "a list of layers")
        elif name in _FLAGS or isinstance(default, bool):
            _require(name, value, value is None or isinstance(value, bool), "true or false")
        elif name in _COUNTS or type(default) is int:
            least = 0 if name == "max_window_layers" else 1
            good = type(value) is int and least <= value < _LARGEST_COUNT
            _require(name, value, good, f"a whole number of at least {least}")
        elif name in _NUMBERS or isinstance(default, float):
            _require(name, value, _is_finite(value), "a finite number")
        elif isinstance(default, str):
            _require(name, value, isinstance(value, str) and value.isprintable(), "a word")
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        _require(name, value, value is None or (isinstance(value, str) and value.isprintable()), "a type's name")
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(name, config.get(name))


def check_json(config: Config) -> None:
    """Make sure that a config can be written as JSON that every reader accepts.

    Raises:
        InputError: a field holds NaN or an infinity.
    """
    for name, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            _require(name, value, False, "finite numbers")


def _check_rope(name: str, value: Any) -> None:
    """Rotary parameters are null or a map of words, numbers and lists of numbers, or one such map per layer type."""
    if value is None:
        return
    _require(name, value, isinstance(value, Mapping), "an object")
    for key, inner in value.items():
        if isinstance(inner, Mapping) and key in ("full_attention", "sliding_attention"):
            _check_rope(f"{name}.{key}", inner)
        elif key in ("rope_type", "type"):
            _require(f"{name}.{key}", inner, isinstance(inner, str) and inner.isprintable(), "a word")
        elif key in ("rope_theta", "partial_rotary_factor", "factor"):
            good = inner is None or (_is_finite(inner) and inner > 0)
            _require(f"{name}.{key}", inner, good, "a finite number above 0")
        else:
            parts = inner if isinstance(inner, list) else [inner]
            good = all(part is None or isinstance(part, bool | str) or _is_finite(part) for part in parts)
            _require(f"{name}.{shown(key)}", inner, good, "finite numbers")


def _check_layer_types(name: str, value: Any, layers: int) -> None:
    good = isinstance(value, list) and all(kind in _LAYER_TYPES for kind in value)
    _require(name, value, good, f"a list of {', '.join(_LAYER_TYPES)}")
    _require(name, value, not value or len(value) == layers, f"one for each of {layers} layers")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf and abs(value) < 1e300


def _require(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(
            f"config.json has {name} = {shown(repr(value))}, expected {expected}.",
            "The weights cannot be read as this says.",
            "Repair the config or fetch it again.",
        )
