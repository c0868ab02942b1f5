"""Pairs that look as if they fit and do not, with the reason; the architectures say so, whatever the weights."""

from __future__ import annotations

ANY = "*"

_GEMMA = "its norms stand before and after attention and FFN and its embeddings are scaled, as in no MoE family known"
_MLA = "its attention has heads of keys and values of their own, and the MoE family makes them from latents (MLA)"

REFUSED: dict[tuple[str, str], str] = {
    ("phi3", "phimoe"): "phimoe has LayerNorm for RMSNorm, and its chosen weights do not sum to 1",
    ("glm4", "glm4_moe"): "glm4 has norms after attention and FFN that glm4_moe lacks",
    ("exaone4", "exaone_moe"): "exaone4 has norms after attention and FFN, exaone_moe before them",
    ("gemma", ANY): "its embeddings are scaled by sqrt(H) and its norms by 1 + weight, as in no MoE family known",
    ("gemma2", ANY): _GEMMA,
    ("gemma3_text", ANY): _GEMMA,
    ("llama", "deepseek_v2"): _MLA,
    ("llama", "deepseek_v3"): _MLA,
    ("olmo2", "olmoe"): "olmo2 has norms after attention and FFN, olmoe before them",
    ("olmo3", "olmoe"): "olmo3 has norms after attention and FFN, olmoe before them",
    ("qwen3", "hunyuan_v1_moe"): "qwen3 norms q and k before they are rotated, hunyuan_v1_moe after",
}
"""(dense model_type, MoE model_type or ANY) -> why they do not compute the same."""


def reason_against(dense: str, moe: str | None) -> str | None:
    """Why the pair is refused, or with `moe` None why the dense family is; None when nothing is known against it."""
    known = [
        reason for (family, into), reason in REFUSED.items() if family == dense and (moe is None or into in (moe, ANY))
    ]
    return known[0] if known else None
