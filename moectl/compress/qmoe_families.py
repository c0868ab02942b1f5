"""Which families' experts are not coded, and why; those of every other MoE family of transformers are."""

from __future__ import annotations

from moectl.compress.prune_families import PART, TWO_STACKS

REFUSED: dict[str, str] = {
    "deepseek_ocr2_text": PART,
    "diffusion_gemma_text": PART,
    "doge": "its experts are rows of an embedding, no matrices",
    "ernie4_5_vl_moe_text": PART,
    "glm4v_moe_text": PART,
    "glm5_next_text": PART,
    "mistral4": PART,
    "mistral_large4_text": PART,
    "muse_spark_text": PART,
    "nllb-moe": TWO_STACKS,
    "openai_privacy_filter": "it labels tokens and predicts none",
    "qwen3_omni_moe_talker_text": PART,
    "qwen3_omni_moe_text": PART,
    "qwen3_vl_moe_text": PART,
    "step3p5": PART,
    "switch_transformers": TWO_STACKS,
    "unlimited_ocr_text": PART,
    "vitpose_backbone": "its experts are chosen by data set, in a model of images",
}
"""model_type -> why it cannot be compressed, whatever its weights."""
