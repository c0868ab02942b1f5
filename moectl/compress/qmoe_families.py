"""Which families' experts are not coded, and why; those of every other MoE family of transformers are."""

from __future__ import annotations

from moectl.compress.prune.families import PART

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
    "openai_privacy_filter": "it labels tokens and predicts none",
    "qwen3_omni_moe_talker_text": PART,
    "qwen3_omni_moe_text": PART,
    "qwen3_vl_moe_text": PART,
    "step3p5": PART,
    "unlimited_ocr_text": PART,
    "vitpose_backbone": "its experts are chosen by data set, in a model of images",
}
"""model_type -> why it cannot be compressed, whatever its weights."""

WARNINGS: dict[str, str] = {
    "nllb-moe": "transformers (5.23) runs experts 0 and 1 of NLLB-MoE in place of all others. These are calibrated on "
    "what they are given there, and the others rounded to nearest: below 4 bits expect little of them elsewhere.",
}
"""model_type -> what to know before compressing it."""
