"""A quantised dense checkpoint is upcycled as the model its weights dequantise to, and a wrong one is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.errors import InputError
from moectl.evaluation.inspect import inspect
from moectl.families.quantised import weights_of
from moectl.families.tiny import tiny_model
from moectl.upcycle.sparse import SparseRecipe, plan_sparse

Tensors = dict[str, torch.Tensor]
Quantised = tuple[Tensors, torch.Tensor]
BLOCK = 32
ODD = {"hidden_size": 60, "head_dim": 20, "intermediate_size": 100}
"""No multiple of the block, nor of eight numbers."""


def by_blocks(scales: torch.Tensor, tall: int, wide: int, shape: torch.Size) -> torch.Tensor:
    return scales.float().repeat_interleave(tall, 0)[: shape[0]].repeat_interleave(wide, 1)[:, : shape[1]]


def fp8(tall: int = BLOCK, wide: int = BLOCK, dtype: torch.dtype = torch.float32) -> Callable[..., Quantised]:
    """A quantiser of a named matrix: stored tensors, and the matrix they mean."""

    def quantise(name: str, w: torch.Tensor) -> Quantised:
        scales = torch.empty(math.ceil(w.shape[0] / tall), math.ceil(w.shape[1] / wide))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                scales[i, j] = w[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide].abs().max() / 448
        scales = scales.to(dtype)
        full = by_blocks(scales, tall, wide, w.shape)
        codes = (w / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scales}, codes.float() * full

    return quantise


def fp8_per_tensor(name: str, w: torch.Tensor) -> Quantised:
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    inputs = name.removesuffix("weight") + "activation_scale"
    return {name: codes, f"{name}_scale_inv": scale.clone(), inputs: torch.tensor(0.5)}, codes.float() * scale


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    each = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    words = sum(padded[:, i::each] << (bits * i) for i in range(each))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # type: ignore[arg-type, operator]


def integers(bits: int, group: int | None, symmetric: bool, g_idx: bool = False) -> Callable[..., Quantised]:
    def quantise(name: str, w: torch.Tensor) -> Quantised:
        rows, columns = w.shape
        wide = group or columns
        groups = math.ceil(columns / wide)
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if g_idx else torch.arange(columns)
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // wide).int()
        scales, zeros = torch.empty(rows, groups), torch.zeros(rows, groups, dtype=torch.long)
        top = 2**bits - 1
        for j in range(groups):
            part = w[:, index == j]
            if symmetric:
                scales[:, j] = part.abs().amax(1) / (top / 2)
                zeros[:, j] = (top + 1) // 2
            else:
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                scales[:, j] = (high - low) / top
                zeros[:, j] = (-low / scales[:, j]).round().clamp(0, top).long()
        scales = scales.bfloat16()
        s, z = scales.float()[:, index], zeros[:, index]
        codes = ((w / s).round() + z).clamp(0, top)
        stored = {
            f"{name}_packed": packed(codes, bits),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            stored[f"{name}_zero_point"] = packed(zeros.T, bits).T
        if g_idx:
            stored[f"{name}_g_idx"] = index
        return stored, (codes - z) * s

    return quantise


def mxfp4(name: str, w: torch.Tensor) -> Quantised:
    random = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (w.shape[0], w.shape[1] // 32, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(122, 125, blocks.shape[:2], generator=random, dtype=torch.uint8)
    meant = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant


def fp8_config(block: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block, **fields}


def packed_config(bits: int, group: int | None, symmetric: Any, **weights: Any) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    arguments = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**arguments, **weights}, "input_activations": None}
        },
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }


SQUARE = [BLOCK, BLOCK]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[..., Quantised]]] = {
    "fp8": ("qwen3", {}, fp8_config(SQUARE), fp8()),
    "fp8, bf16 scales": ("llama", {}, fp8_config(SQUARE), fp8(dtype=torch.bfloat16)),
    "fp8, odd sizes": ("llama", ODD, fp8_config(SQUARE), fp8()),
    "fp8, default block larger than all": ("llama", {}, fp8_config([128, 128]), fp8(128, 128)),
    "fp8, absurd block": ("llama", {}, fp8_config([10**30, 10**30]), fp8(128, 128)),
    "fp8, oblong blocks": ("llama", ODD, fp8_config([16, 64]), fp8(16, 64)),
    "fp8 per tensor": ("qwen3", ODD, fp8_config(None, activation_scheme="static"), fp8_per_tensor),
    "int4 groups": ("qwen3", {}, packed_config(4, 32, True), integers(4, 32, True)),
    "int4 groups, zero points": ("llama", {}, packed_config(4, 16, False), integers(4, 16, False)),
    "int4 channels, odd sizes": ("llama", ODD, packed_config(4, None, True), integers(4, None, True)),
    "int4 zero points, odd sizes": ("llama", ODD, packed_config(4, 20, False), integers(4, 20, False)),
    "int4 activation order": ("llama", {}, packed_config(4, 16, False), integers(4, 16, False, g_idx=True)),
    "int8 channels": ("qwen3", {}, packed_config(8, None, True), integers(8, None, True)),
    "int8 groups, zero points": ("llama", ODD, packed_config(8, 20, False), integers(8, 20, False)),
    "mxfp4": ("llama", {}, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, mxfp4),
}


def quantised_pair(directory: Path, case: str, dtype: str | None = "float32") -> tuple[Path, Path]:
    """A quantised checkpoint, and beside it the plain one it means, in float32."""
    model_type, sizes, stated, quantise = CASES[case]
    plain, quantised = directory / "plain", directory / "quantised"
    if model_type == "qwen3":
        sizes = {"head_dim": 16, **sizes}
    for path in (plain, quantised):
        tiny_model(model_type, **sizes).save_pretrained(path)
    meant, stored = {}, {}
    for name, w in load_file(plain / "model.safetensors").items():
        if re.search(r"_proj\.weight$", name):
            parts, meant[name] = quantise(name, w)
            stored |= parts
        else:
            meant[name] = stored[name] = w
    for path, tensors in ((plain, meant), (quantised, stored)):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    change_config(quantised, dtype=dtype, quantization_config=stated)
    return quantised, plain


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_tensors(directory: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})


def upcycled(dense: Path, out: Path, **recipe: Any) -> Path:
    write(plan_sparse(Checkpoint.open(dense), SparseRecipe(**{"experts": 4, **recipe})), out)
    return out


def logits(directory: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_moe_equals_the_dequantised_dense_model(case: str, tmp_path: Path) -> None:
    quantised, plain = quantised_pair(tmp_path, case)
    moe = upcycled(quantised, tmp_path / "moe", dtype="float32")
    config = json.loads((moe / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    error = relative_error(logits(moe), logits(plain))
    print(f"{case}: {error:.1e}")
    assert error <= 1e-5
    written, meant = load_file(moe / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in written.values())
    kept = [name for name in meant if name in written]
    assert any("self_attn.q_proj" in name for name in kept) and all(torch.equal(written[n], meant[n]) for n in kept)


@pytest.mark.parametrize("case", ["fp8", "int4 groups", "mxfp4"])
@pytest.mark.parametrize(("dtype", "expected"), [("float16", "float16"), ("bfloat16", "bfloat16"), (None, "bfloat16")])
def test_dequantised_weights_have_the_dtype_of_the_config(
    case: str, dtype: str | None, expected: str, tmp_path: Path
) -> None:
    quantised, plain = quantised_pair(tmp_path, case, dtype)
    plan = plan_sparse(Checkpoint.open(quantised), SparseRecipe())
    assert plan.config["dtype"] == expected
    assert plan.facts["exact"] and plan.facts["dequantised"].startswith(case.split()[0])
    dense = Checkpoint.open(plain)
    assert plan.facts["source_parameters"] == sum(math.prod(ref.shape) for ref in dense.tensors.values())
    write(plan, tmp_path / "moe")
    written, meant = load_file(tmp_path / "moe" / "model.safetensors"), load_file(plain / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(written[name], meant[name].to(getattr(torch, expected)))
    assert torch.equal(written["lm_head.weight"], meant["lm_head.weight"])  # was not quantised: copied as it is


def test_a_torch_dtype_of_old_is_read(tmp_path: Path) -> None:
    quantised, _ = quantised_pair(tmp_path, "fp8", None)
    change_config(quantised, torch_dtype="float16")
    plan = plan_sparse(Checkpoint.open(quantised), SparseRecipe())
    assert plan.config["dtype"] == "float16" and "torch_dtype" not in plan.config


@pytest.mark.parametrize("recipe", [{"noise": 0.01}, {"shard_bytes": 100_000}, {"dtype": "float16"}])
def test_other_recipes_take_quantised_sources_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Drawn values too: they are keyed by place, not by how the source is stored."""
    quantised, plain = quantised_pair(tmp_path, "int4 groups, zero points")
    found, expected = upcycled(quantised, tmp_path / "a", **recipe), upcycled(plain, tmp_path / "b", **recipe)
    first, second = Checkpoint.open(found), Checkpoint.open(expected)
    assert list(first.tensors) == list(second.tensors)
    assert all(first.read(name).tobytes() == second.read(name).tobytes() for name in first.tensors)


def test_weights_of_a_plain_checkpoint_are_the_stored_tensors(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    weights = weights_of(source)
    assert list(weights.tensors) == list(source.tensors) and not weights.consumed and weights.scheme is None
    assert weights.config is source.config


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("case", ["fp8, odd sizes", "int4 zero points, odd sizes", "int8 groups, zero points", "mxfp4"])
def test_they_are_inspected_as_the_models_they_are_of(case: str, tmp_path: Path) -> None:
    quantised, plain = (inspect(Checkpoint.open(path)) for path in quantised_pair(tmp_path, case))
    assert quantised.parameters == plain.parameters and quantised.active_parameters == plain.active_parameters
    for one, other in zip(quantised.components, plain.components, strict=True):
        assert (one.component, one.parameters) == (other.component, other.parameters)
    assert quantised.bytes < plain.bytes and quantised.bits_per_parameter == 8 * quantised.bytes / plain.parameters


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor], of: str = "") -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[of or name]))


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("fp8", drop(f"{Q}_scale_inv"), f"tensor '{Q}_scale_inv': expected F32/BF16/F16/F8_E8M0/U8 of shape [2, 2]"),
        ("fp8", drop(Q), f"lacks tensor '{Q}' of shape [64, 64]"),
        ("fp8", put(Q, torch.Tensor.float), f"tensor '{Q}': expected F8_E4M3/F8_E5M2, found F32 of shape [64, 64]"),
        (
            "fp8, odd sizes",
            put("model.layers.0.mlp.up_proj.weight_scale_inv", lambda x: x.T),
            "up_proj.weight_scale_inv': expected F32/BF16/F16/F8_E8M0/U8 of shape [4, 2], found F32 of shape [2, 4]",
        ),
        ("fp8", put("x.weight_scale_inv", torch.clone, f"{Q}_scale_inv"), "tensor 'x.weight_scale_inv', which is no"),
        ("fp8", put(Q, lambda x: x[:32]), f"'{Q}_scale_inv': expected F32/BF16/F16/F8_E8M0/U8 of shape [1, 2], found"),
        (
            "fp8 per tensor",
            put(f"{Q}_scale_inv", lambda x: x.repeat(80)),
            "expected F32/BF16/F16/F8_E8M0/U8 of shape [] or [1] or [1, 1], found F32 of shape [80]",
        ),
        ("int4 groups", drop(f"{Q}_scale"), f"tensor '{Q}_scale': expected F32/BF16/F16 of shape [64, 2], found none"),
        ("int4 groups", drop(f"{Q}_shape"), f"tensor '{Q}_shape': expected I64/I32 of shape [2], found none"),
        ("int4 groups", drop(f"{Q}_packed"), f"lacks tensor '{Q}' of shape [64, 64]"),
        (
            "int4 groups",
            put(f"{Q}_packed", lambda x: x[:, :-1]),
            f"tensor '{Q}_packed': expected I32 of shape [64, 8] (64 x 64 by '{Q}_shape', 4 bits each), found I32 of",
        ),
        ("int4 groups", put(f"{Q}_shape", lambda x: -x), "(-64 x -64 by"),
        ("int4 groups", put(f"{Q}_shape", lambda x: x - x), "(0 x 0 by"),
        (
            "int4 groups",
            put(f"{Q}_scale", lambda x: x.T),
            "expected F32/BF16/F16 of shape [64, 2], found BF16 of shape",
        ),
        ("int4 groups", put(Q, torch.clone, "lm_head.weight"), f"tensor '{Q}': expected absent"),
        ("int4 groups", put(f"{Q}_zero_point", torch.clone, f"{Q}_packed"), f"tensor '{Q}_zero_point', which is no"),
        ("int4 groups, zero points", drop(f"{Q}_zero_point"), "expected I32 of shape [8, 4], found none"),
        (
            "int4 groups, zero points",
            put(f"{Q}_zero_point", lambda x: x.T),
            f"tensor '{Q}_zero_point': expected I32 of shape [8, 4], found I32 of shape [4, 8]",
        ),
        ("int4 activation order", put(f"{Q}_g_idx", lambda x: x[1:]), "expected I32/I64 of shape [64], found I32 of"),
        ("mxfp4", drop(f"{Q}_scales"), f"tensor '{Q}_scales': expected U8/F8_E8M0 of shape [64, 2], found none"),
        ("mxfp4", put(f"{Q}_blocks", lambda x: x[..., :8]), f"tensor '{Q}_blocks': expected blocks [O, G, 16] of"),
        ("mxfp4", put(f"{Q}_blocks", lambda x: x[None]), f"tensor '{Q}_blocks': expected blocks [O, G, 16] of"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    case: str, change: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    quantised, _ = quantised_pair(tmp_path, case)
    change_tensors(quantised, change)
    with pytest.raises(InputError) as caught:
        plan_sparse(Checkpoint.open(quantised), SparseRecipe())
    assert message in caught.value.what and caught.value.fix


GROUP = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("fp8", "quantization_config.quant_method = None"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config.quant_method = 'gptq', expected one of fp8, "),
        ({"quant_method": ["fp8"]}, "quantization_config.quant_method = ['fp8']"),
        (fp8_config([128]), "quantization_config.weight_block_size = [128]"),
        (fp8_config([0, 128]), "quantization_config.weight_block_size = [0, 128]"),
        (fp8_config(SQUARE, scale_fmt="odd"), "quantization_config.scale_fmt = 'odd'"),
        ({**packed_config(4, 32, True), "format": "marlin-24"}, "quantization_config.format = 'marlin-24'"),
        (packed_config(3, 32, True), f"quantization_config.{GROUP}.num_bits = 3, expected 4 or 8"),
        (packed_config(4, 32, True, num_bits=4.0), f"quantization_config.{GROUP}.num_bits = 4.0, expected 4 or 8"),
        (packed_config(4, 32, True, type="float"), f"quantization_config.{GROUP}.type = 'float'"),
        (packed_config(4, 32, True, strategy="block"), f"quantization_config.{GROUP}.strategy = 'block'"),
        (packed_config(4, 32, True, group_size=None), f"quantization_config.{GROUP}.group_size = None"),
        (packed_config(4, 32, "no"), f"quantization_config.{GROUP}.symmetric = 'no'"),
        ({**packed_config(4, 32, True), "config_groups": {}}, "quantization_config.config_groups = {}"),
        ({**packed_config(4, 32, True), "config_groups": {"a": 3}}, "config_groups.a.weights = None"),
        ({**packed_config(4, 32, True), "transform_config": {"config_groups": {"u": 1}}}, "config.transform_config = "),
        ({**packed_config(4, 32, True), "sparsity_config": {"format": "sparse-24-bitmask"}}, "config.sparsity_config"),
        (
            {
                **packed_config(4, 32, True),
                "config_groups": {f"{b}": packed_config(b, 32, True)["config_groups"]["group_0"] for b in (4, 8)},
            },
            "expected one scheme for all weights",
        ),
        ({"quant_method": "mxfp4"}, "has a quantization_config (mxfp4), but no tensor is quantised that way"),
    ],
)
def test_other_ways_of_quantising_are_refused_by_field(stated: Any, message: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=stated)
    with pytest.raises(InputError) as caught:
        plan_sparse(Checkpoint.open(tmp_path), SparseRecipe())
    assert message in caught.value.what and caught.value.fix


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    quantised, _ = quantised_pair(tmp_path, "fp8")
    for dtype in ("float8_e4m3fn", ["bfloat16"]):
        change_config(quantised, dtype=dtype)
        with pytest.raises(InputError, match=r"has dtype = .*, expected one of"):
            plan_sparse(Checkpoint.open(quantised), SparseRecipe())


@pytest.mark.parametrize("case", ["fp8", "int4 groups"])
def test_transposed_scales_are_far_above_the_tolerance(case: str, tmp_path: Path) -> None:
    quantised, plain = quantised_pair(tmp_path, case)
    name = "model.layers.0.self_attn.o_proj.weight" + ("_scale_inv" if case == "fp8" else "_scale")
    change_tensors(quantised, put(name, lambda x: x.T.reshape(x.shape)))
    assert relative_error(logits(upcycled(quantised, tmp_path / "moe", dtype="float32")), logits(plain)) > 1e-4
