"""FlexOlmo (arXiv 2507.07024) and what becomes one."""

from __future__ import annotations

from moectl.families import decoder
from moectl.families.qwen2_moe import QWEN2_MOE
from moectl.families.spec import MoeFamily, Pair

FLEX_OLMO = MoeFamily(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    router=QWEN2_MOE.router,
    mlp=QWEN2_MOE.mlp,
    fields={
        "num_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "expert_width": "intermediate_size",
        "norm_topk": "norm_topk_prob",
        "aux_loss": "router_aux_loss_coef",
    },
    values={"output_router_logits": False},
)


_KEEP = (*decoder.KEEP, "attention_bias")
PAIRS = (
    Pair("olmo2", "flex_olmo", keep=_KEEP),
    Pair("olmo3", "flex_olmo", keep=_KEEP, refuse=(decoder.no_windows,)),
)
