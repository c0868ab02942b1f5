"""Phi-3 and Phi-4 (arXiv 2404.14219): one matrix for q, k and v, one for gate and up."""

from __future__ import annotations

from typing import Any

from moectl.families import decoder
from moectl.families.spec import Config, DenseFamily, FusedMlp, TensorSpec

QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"


def _old_names_of_longrope(config: Config) -> dict[str, Any]:
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("su", "yarn"):
        return {}
    scaling = {**config["rope_scaling"], "rope_type": "longrope"}
    return {"rope_parameters": {**rope, "rope_type": "longrope"}, "rope_scaling": scaling}


PHI3 = DenseFamily(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "sliding_window": None,
    },
    tensors=(
        *(
            spec
            for spec in decoder.TENSORS
            if not spec.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        ),
        TensorSpec(QKV, ("Q+2KV", "H")),
    ),
    mlp=FusedMlp(gate_up="model.layers.{layer}.mlp.gate_up_proj.weight", down=decoder.MLP.down),
    derive=_old_names_of_longrope,
    partial_rotary_factor=1.0,
)
