"""Hunyuan dense and Hunyuan-Large (arXiv 2411.02265) and the pair between them: norms on q and k after rotation."""

from moectl.families import decoder
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import DenseFamily, GatedMlp, MoeFamily, Pair, SharedExpert, TensorSpec

HUNYUAN_V1_DENSE = DenseFamily(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    defaults={
        **decoder.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eod_token_id": 3,
        "attention_bias": False,
    },
    tensors=(
        *decoder.TENSORS,
        *decoder.QKV_BIASES,
        decoder.O_BIAS,
        TensorSpec("model.layers.{layer}.self_attn.query_layernorm.weight", ("D",)),
        TensorSpec("model.layers.{layer}.self_attn.key_layernorm.weight", ("D",)),
    ),
    mlp=decoder.MLP,
)
HUNYUAN_V1_MOE = MoeFamily(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    router="model.layers.{layer}.mlp.gate.wg.weight",
    mlp=QWEN2_MOE.mlp,
    fields={"num_experts": "num_experts", "top_k": "moe_topk", "expert_width": "intermediate_size"},
    values={"output_router_logits": False},
    shared=SharedExpert(
        mlp=GatedMlp(
            gate="model.layers.{layer}.mlp.shared_mlp.gate_proj.weight",
            up="model.layers.{layer}.mlp.shared_mlp.up_proj.weight",
            down="model.layers.{layer}.mlp.shared_mlp.down_proj.weight",
        ),
        default="copy",
    ),
)

PAIRS = (Pair("hunyuan_v1_dense", "hunyuan_v1_moe", keep=(*decoder.KEEP, "eod_token_id", "attention_bias")),)
