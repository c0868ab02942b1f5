"""Every pair computes the dense model's function, loads without a gap, and keeps its layout when saved again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError, UsageError
from moectl.families.registry import DENSE, MOE, PAIRS, REFUSED, find_pair
from moectl.families.spec import Pair
from moectl.families.tiny import OWN_SIZES, tiny_model
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
COMMON: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "linear rope": {"rope_parameters": LINEAR},
    "odd eps and activation": {"rms_norm_eps": 3e-3, "hidden_act": "gelu"},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"head size": {"head_dim": 32}, "one kv head": {"num_key_value_heads": 1}},
    "mistral": {"window": {"sliding_window": 16}, "no window": {"sliding_window": None}},
    "qwen2->qwen2_moe": {
        "window on upper layers": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "window on all": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "explicit layer types": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
    "qwen3": {"head size": {"head_dim": 32}},
    "qwen3->qwen3_moe": {
        "attention bias": {"attention_bias": True},
        "window on all": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    },
    "qwen3->dots1": {
        "attention bias": {"attention_bias": True},
        "window on upper layers": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    },
    "qwen3_5_text": {
        # Smaller weights: at 0.15 linear attention makes 6e-6 of float32's rounding in the dense model alone.
        "attention bias": {"attention_bias": True, "initializer_range": 0.1},
        "more rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    },
    "phi3": {
        "window": {"sliding_window": 16},
        "longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    },
    "olmo2": {"attention bias": {"attention_bias": True}},
    "olmo3": {
        "attention bias": {"attention_bias": True},
        "nested rope": {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}},
    },
    "granite": {"multipliers": MULTIPLIERS, "attention bias": {"attention_bias": True}},
    "cohere2": {
        "windows": {"sliding_window": 16, "layer_norm_eps": 3e-3, "logit_scale": 0.5},
        "layer types": {
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "attention bias": {"attention_bias": True},
    },
    "ernie4_5": {"head size": {"head_dim": 32}},
    "glm": {
        "no attention bias": {"attention_bias": False},
        "whole rotary": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
        },
        "head size": {"head_dim": 32},
        "odd rotary part": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.2}
        },
    },
    "hunyuan_v1_dense": {
        "alpha rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "alpha": 100.0, "factor": 1.0}},
        "attention bias and head size": {"attention_bias": True, "head_dim": 32},
    },
    "lfm2": {
        "adjusted width": {"block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3},
        "convolution bias": {"conv_bias": True, "conv_L_cache": 4, "norm_eps": 3e-3},
        "attention by number": {"layer_types": None, "full_attn_idxs": [2]},
    },
}
OWN_ROPE = {"phi3", "olmo3"}
"""Families whose configs refuse the rope types of others, or nest them."""
ALWAYS = {"olmo3": {"layer_types": ["full_attention"] * 3}}
CASES = [
    pytest.param(pair.dense, pair.moe, overrides, id=f"{pair.dense}->{pair.moe}: {name}")
    for pair in PAIRS
    if MOE[pair.moe].encoder is None  # test_switch.py
    for name, overrides in {**COMMON, **OWN.get(pair.dense, {}), **OWN.get(f"{pair.dense}->{pair.moe}", {})}.items()
    if not (name.endswith(" rope") and name in COMMON and pair.dense in OWN_ROPE)
]
LENGTH = 48


def logits(model: Any) -> torch.Tensor:
    """Logits of fixed random ids, longer than any window used here."""
    ids = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def reload(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def upcycled(dense: Path, out: Path, **recipe: Any) -> Path:
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(**{"experts": 4, **recipe})), out)
    return out


@pytest.mark.parametrize(("dense_type", "moe_type", "overrides"), CASES)
def test_moe_equals_dense(
    dense_type: str,
    moe_type: str,
    overrides: dict[str, Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("pair", f"{dense_type} -> {moe_type}")
    dense = tiny_model(dense_type, **{**ALWAYS.get(dense_type, {}), **deepcopy(overrides)})
    dense.save_pretrained(tmp_path / "dense")
    model = reload(upcycled(tmp_path / "dense", tmp_path / "moe", into=moe_type, shard_bytes=200_000))
    assert model.config.model_type == moe_type
    assert relative_error(logits(model), logits(dense)) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    first = Checkpoint.open(tmp_path / "moe")
    assert {name: ref.shape for name, ref in again.tensors.items()} == {
        name: ref.shape for name, ref in first.tensors.items()
    }
    down = MOE[moe_type].mlp.down
    expert = re.compile(re.escape(down).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"))
    experts_per_layer = 4 if "{expert}" in down else 1
    assert sum(bool(expert.fullmatch(name)) for name in again.tensors) == 3 * experts_per_layer


@pytest.mark.parametrize("spoil", ["sliding_window", "rope_theta", "norm_topk_prob"])
def test_the_tolerance_can_fail(spoil: str, tmp_path: Path) -> None:
    """The errors this kind of conversion makes in practice are far above the tolerance."""
    dense = tiny_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    config = json.loads((moe / "config.json").read_text())
    match spoil:
        case "sliding_window":
            config |= {"layer_types": ["full_attention"] * 3}
        case "rope_theta":
            config |= {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
        case "norm_topk_prob":
            config |= {"norm_topk_prob": False}
    (moe / "config.json").write_text(json.dumps(config))
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-3


WHOLE_HEADS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
HALF_HEADS = {**WHOLE_HEADS, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("dense_type", "moe_type", "overrides", "spoilt"),
    [
        ("phi3", "mixtral", {"sliding_window": 16}, {"sliding_window": None}),
        ("llama", "glm4_moe", {}, {"rope_parameters": HALF_HEADS}),
        ("glm", "glm4_moe", {}, {"rope_parameters": WHOLE_HEADS}),
        ("glm", "glm4_moe", {}, {"routed_scaling_factor": 1.1}),
        ("llama", "granitemoe", {}, {"attention_multiplier": 1.0}),
        ("granite", "granitemoeshared", MULTIPLIERS, {"residual_multiplier": 1.0}),
        ("granite", "granitemoehybrid", {}, {"position_embedding_type": None}),
        ("olmo2", "flex_olmo", {"rms_norm_eps": 3e-2}, {"rms_norm_eps": 1e-6}),
        ("cohere2", "cohere2_moe", {"sliding_window": 16}, {"layer_types": ["full_attention"] * 3}),
        ("cohere2", "cohere2_moe", {"layer_norm_eps": 3e-3}, {"rms_norm_eps": 3e-3}),
        ("ernie4_5", "ernie4_5_moe", {}, {"rope_theta": 10.0, "rope_parameters": None}),
        ("qwen3", "dots1", {}, {"norm_topk_prob": False}),
        ("lfm2", "lfm2_moe", {}, {"norm_topk_prob": False}),
        ("qwen3_5_text", "qwen3_5_moe_text", {}, {"rope_parameters": WHOLE_HEADS}),
    ],
)
def test_every_translated_field_matters(
    dense_type: str, moe_type: str, overrides: dict[str, Any], spoilt: dict[str, Any], tmp_path: Path
) -> None:
    dense = tiny_model(dense_type, **overrides)
    dense.save_pretrained(tmp_path / "dense")
    moe = upcycled(tmp_path / "dense", tmp_path / "moe", into=moe_type)
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(config | spoilt))
    assert relative_error(logits(reload(moe)), logits(dense)) > 1e-3


def test_glm_without_its_rows_in_order(tmp_path: Path) -> None:
    """The permutation of rotary rows is what makes the pair: undone, the logits are far off."""
    dense = tiny_model("glm")
    dense.save_pretrained(tmp_path / "dense")
    model = reload(upcycled(tmp_path / "dense", tmp_path / "moe"))
    assert relative_error(logits(model), logits(dense)) <= 1e-5
    model.model.layers[0].self_attn.q_proj.weight.data = dense.model.layers[0].self_attn.q_proj.weight.data
    assert relative_error(logits(model), logits(dense)) > 1e-3


SHARING = [pair for pair in PAIRS if MOE[pair.moe].shared]


@pytest.mark.parametrize("pair", SHARING, ids=lambda pair: f"{pair.dense}->{pair.moe}")
def test_a_shared_expert_takes_half(pair: Pair, tmp_path: Path) -> None:
    """`--shared-experts`: the FFN once more, always active; it and the routed experts give half each."""
    dense = tiny_model(pair.dense)
    dense.save_pretrained(tmp_path / "dense")
    out = upcycled(tmp_path / "dense", tmp_path / "moe", into=pair.moe, shared_experts=True)
    assert relative_error(logits(reload(out)), logits(dense)) <= 1e-5
    shared = MOE[pair.moe].shared
    assert shared is not None
    moe, source = Checkpoint.open(out), Checkpoint.open(tmp_path / "dense")
    name = shared.mlp.down.format(layer=1)
    factor = 1.0 if shared.gate_row else 0.5
    assert (moe.read(name) == factor * source.read(DENSE[pair.dense].mlp.down.format(layer=1))).all()


def test_a_shared_expert_beside_narrow_ones(tmp_path: Path) -> None:
    """Where the family counts shared experts as wide as routed ones, there are as many as the FFN was cut into."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    for moe_type in ("glm4_moe", "qwen2_moe"):
        moe = upcycled(
            tmp_path / "dense", tmp_path / moe_type, into=moe_type, granularity=2, top_k=2, shared_experts=True
        )
        assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5
    tiny_model("hunyuan_v1_dense").save_pretrained(tmp_path / "hunyuan")
    with pytest.raises(UsageError, match="as wide as a routed one"):
        plan_sparse(Checkpoint.open(tmp_path / "hunyuan"), SparseRecipe(granularity=2))


def test_too_few_experts_for_the_router(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense")
    with pytest.raises(UsageError, match="--experts 1 is too few for glm4_moe"):
        plan_sparse(source, SparseRecipe(experts=1, top_k=1, into="glm4_moe"))
    assert plan_sparse(source, SparseRecipe(experts=1, top_k=1, into="mixtral")).facts["exact"]


def test_a_shared_expert_where_none_can_be(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="mixtral has no shared expert") as caught:
        plan_sparse(Checkpoint.open(tmp_path / "dense"), SparseRecipe(shared_experts=True))
    assert "--into qwen2_moe or glm4_moe" in caught.value.fix


@pytest.mark.parametrize("dense_type", [name for name in DENSE if name not in ("olmo3", "t5")])
@pytest.mark.parametrize("theta", [None, 30000.0])
def test_configs_that_leave_everything_to_defaults(dense_type: str, theta: float | None, tmp_path: Path) -> None:
    """Hub configs written by hand or by old versions say little; the defaults of the dense family still hold."""
    rope = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    dense = tiny_model(dense_type, **rope)
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    needed = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    kept = {name: config[name] for name in (*needed, *heads, *OWN_SIZES.get(dense_type, ()))}
    kept |= {"pad_token_id": 0, "torch_dtype": "float32"}
    path.write_text(json.dumps(kept | ({} if theta is None else {"rope_theta": theta})))
    stripped = reload(tmp_path / "dense")
    moe = reload(upcycled(tmp_path / "dense", tmp_path / "moe"))
    assert relative_error(logits(moe), logits(stripped)) <= 1e-5
    assert moe.config.max_position_embeddings == stripped.config.max_position_embeddings


def test_legacy_rope_scaling_is_kept(tmp_path: Path) -> None:
    dense = tiny_model("llama", rope_parameters=YARN)
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps({**config, "rope_scaling": rope}))
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5
    written = json.loads((moe / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 4.0 and written["rope_theta"] == 20000.0


def test_a_tied_head_that_is_stored_goes_along(tmp_path: Path) -> None:
    dense = tiny_model("llama", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    moe = upcycled(tmp_path / "dense", tmp_path / "moe")
    assert relative_error(logits(reload(moe)), logits(dense)) <= 1e-5


def test_sixteen_bit_sources_and_casts(tmp_path: Path) -> None:
    """A bf16 source is copied bit for bit; a cast output loads and is close to what the cast dense model says."""
    tiny_model("qwen3", head_dim=16).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    moe = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "moe"))
    source = Checkpoint.open(tmp_path / "dense")
    name = "model.layers.1.mlp.{}down_proj.weight"
    for expert in range(4):
        assert (moe.read(name.format(f"experts.{expert}.")) == source.read(name.format(""))).all()
    assert moe.config["dtype"] == "bfloat16"
    expected = logits(reload(tmp_path / "dense"))
    assert relative_error(logits(reload(moe.path)), expected) <= 1e-5
    cast = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "cast", dtype="float32"))
    assert {ref.dtype for ref in cast.tensors.values()} == {"F32"}
    assert relative_error(logits(reload(cast.path)), expected) <= 1e-5


@pytest.mark.parametrize(("dense_type", "moe_type"), [("llama", "glm4_moe"), ("glm", "glm4_moe"), ("lfm2", "lfm2_moe")])
def test_balancing_biases_stay_float32(dense_type: str, moe_type: str, tmp_path: Path) -> None:
    tiny_model(dense_type).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    moe = Checkpoint.open(upcycled(tmp_path / "dense", tmp_path / "moe", into=moe_type))
    biases = [spec.name.format(layer=layer) for spec in MOE[moe_type].biases for layer in range(3)]
    assert {name for name, ref in moe.tensors.items() if ref.dtype == "F32"} == set(biases)
    assert relative_error(logits(reload(moe.path)), logits(reload(tmp_path / "dense"))) <= 1e-5


def test_what_a_pair_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    half = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("phi3", "mixtral", {"rope_parameters": half}, "partial_rotary_factor is 0.5, and mixtral rotates whole heads"),
        ("olmo3", "flex_olmo", {}, "3 of its layers attend within a sliding window"),
        ("llama", "qwen2_moe", {"attention_bias": True}, "attention_bias is true"),
        ("llama", "glm4_moe", {"attention_bias": True}, "attention_bias is true"),
        ("qwen2", "glm4_moe", {"use_sliding_window": True, "max_window_layers": 1}, "2 of its layers attend"),
        ("qwen3", "glm4_moe", {"attention_bias": True}, "attention_bias is true"),
        ("granite", "granitemoe", {"mlp_bias": True}, "mlp_bias is true"),
        ("ernie4_5", "ernie4_5_moe", {"use_bias": True}, "use_bias is true"),
    ]
    for number, (dense_type, moe_type, options, reason) in enumerate(cases):
        tiny_model(dense_type, **options).save_pretrained(tmp_path / str(number))
        with pytest.raises(InputError, match=re.escape(reason)):
            plan_sparse(Checkpoint.open(tmp_path / str(number)), SparseRecipe(into=moe_type))


def test_refused_pairs_say_why() -> None:
    assert list(REFUSED) == [
        ("phi3", "phimoe"),
        ("glm4", "glm4_moe"),
        ("exaone4", "exaone_moe"),
        ("gemma", "*"),
        ("gemma2", "*"),
        ("gemma3_text", "*"),
        ("llama", "deepseek_v2"),
        ("llama", "deepseek_v3"),
        ("olmo2", "olmoe"),
        ("olmo3", "olmoe"),
        ("qwen3", "hunyuan_v1_moe"),
    ]
    assert not REFUSED.keys() & {(pair.dense, pair.moe) for pair in PAIRS}
    for (dense, moe), reason in REFUSED.items():
        with pytest.raises((InputError, UsageError)) as caught:
            find_pair(dense, None if moe == "*" else moe)
        assert caught.value.why[1:-1] == reason[1:]
