"""Presets are what transformers and published configs say; shapes come from any config.json."""

import json

import pytest
from transformers import CONFIG_MAPPING

from moectl.bench.shapes import PRESETS, Shape, choose, of_config, of_model, parse
from moectl.errors import InputError, MachineError, UsageError

DEFAULTS = {
    "mixtral-8x7b": "mixtral",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-next-80b-a3b": "qwen3_next",
    "deepseek-v3": "deepseek_v3",
    "gpt-oss-120b": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "phi-3.5-moe": "phimoe",
}
"""Presets whose model is the one that transformers' default config describes (OLMoE's has experts twice as wide)."""


def numbers(shape: Shape) -> tuple[int, int, int, int]:
    return shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k


@pytest.mark.parametrize("preset", DEFAULTS)
def test_presets_are_the_default_configs(preset, tmp_path):
    config = CONFIG_MAPPING[DEFAULTS[preset]]()
    config.save_pretrained(tmp_path)
    assert numbers(of_model(str(tmp_path))) == numbers(PRESETS[preset])


def test_every_preset_says_where_it_is_from():
    assert all(shape.source.count("/") == 1 and shape.top_k <= shape.num_experts for shape in PRESETS.values())


def test_a_config_file_a_directory_and_a_nested_config(tmp_path):
    config = {"hidden_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    nested = of_config({"text_config": {**config, "moe_intermediate_size": 6}}, "n", "n")
    assert numbers(of_model(str(tmp_path))) == numbers(of_model(str(tmp_path / "config.json"))) == (8, 16, 4, 2)
    assert numbers(nested) == (8, 6, 4, 2)


def test_what_is_no_shape(tmp_path):
    for text in ("", "1,2,3", "8,8,4,5", "0,1,1,1", "a,b,c,d", "1,2,3,4,5", "-8,8,4,1"):
        with pytest.raises(UsageError):
            parse(text)
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "intermediate_size": 16}')
    with pytest.raises(InputError, match="num_experts, top_k"):
        of_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError):
        of_model(str(tmp_path))
    with pytest.raises(MachineError):  # tests are offline
        of_model("org/model-that-is-not-cached")
    with pytest.raises(InputError):
        of_model("no such/model at all")


def test_tensor_parallel_shares():
    (shape,) = choose(["mixtral-8x7b"], [], 4)
    assert numbers(shape) == (4096, 14336 // 4, 8, 2) and shape.name == "mixtral-8x7b tp4"
    with pytest.raises(UsageError, match="does not divide"):
        choose([], ["8,6,4,2"], 4)
