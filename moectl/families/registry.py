"""Every family and pair moectl knows. A new one is its own file and a line here."""

from __future__ import annotations

from moectl.errors import InputError, UsageError
from moectl.families import (
    cohere2_moe,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    granitemoe,
    hunyuan,
    lfm2,
    mixtral,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    switch,
)
from moectl.families.cohere2 import COHERE2
from moectl.families.ernie4_5 import ERNIE4_5
from moectl.families.glm import GLM
from moectl.families.granite import GRANITE
from moectl.families.llama import LLAMA
from moectl.families.mistral import MISTRAL
from moectl.families.olmo import OLMO2, OLMO3
from moectl.families.phi3 import PHI3
from moectl.families.qwen2 import QWEN2
from moectl.families.qwen3 import QWEN3
from moectl.families.qwen3_5 import QWEN3_5
from moectl.families.refused import REFUSED, reason_against
from moectl.families.spec import DenseFamily, MoeFamily, Pair
from moectl.families.t5 import T5
from moectl.text import shown

__all__ = ["DENSE", "MOE", "PAIRS", "REFUSED", "find_pair"]

DENSE: dict[str, DenseFamily] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN3_5,
        PHI3,
        OLMO2,
        OLMO3,
        GRANITE,
        COHERE2,
        ERNIE4_5,
        GLM,
        hunyuan.HUNYUAN_V1_DENSE,
        lfm2.LFM2,
        T5,
    )
}
MOE: dict[str, MoeFamily] = {
    family.model_type: family
    for family in (
        mixtral.MIXTRAL,
        qwen2_moe.QWEN2_MOE,
        qwen3_moe.QWEN3_MOE,
        qwen3_5_moe.QWEN3_5_MOE,
        flex_olmo.FLEX_OLMO,
        granitemoe.GRANITEMOE,
        granitemoe.GRANITEMOESHARED,
        granitemoe.GRANITEMOEHYBRID,
        cohere2_moe.COHERE2_MOE,
        ernie4_5_moe.ERNIE4_5_MOE,
        glm4_moe.GLM4_MOE,
        glm4_moe.SOLAR_OPEN,
        glm4_moe.DOTS1,
        hunyuan.HUNYUAN_V1_MOE,
        lfm2.LFM2_MOE,
        switch.SWITCH_TRANSFORMERS,
    )
}
PAIRS: tuple[Pair, ...] = (
    *mixtral.PAIRS,
    *qwen2_moe.PAIRS,
    *qwen3_moe.PAIRS,
    *qwen3_5_moe.PAIRS,
    *flex_olmo.PAIRS,
    *granitemoe.PAIRS,
    *cohere2_moe.PAIRS,
    *ernie4_5_moe.PAIRS,
    *glm4_moe.PAIRS,
    *hunyuan.PAIRS,
    *lfm2.PAIRS,
    *switch.PAIRS,
)
"""A dense family's first pair is the one taken when none is asked for."""


def find_pair(dense: str, into: str | None) -> Pair:
    """The pair of a dense model_type and a MoE model_type, or the dense family's first when `into` is None.

    Raises:
        InputError: the dense family is not one that can be upcycled.
        UsageError: it cannot become `into`.
    """
    pairs = [pair for pair in PAIRS if pair.dense == dense]
    reason = reason_against(dense, into)
    if not pairs:
        known = ", ".join(sorted({pair.dense for pair in PAIRS}))
        raise InputError(
            f"config.json: model_type {dense!r} cannot be upcycled.",
            _sentence(reason or "no MoE family is known that computes the same"),
            f"Known: {known}.",
        )
    for pair in pairs:
        if into is None or pair.moe == into:
            return pair
    targets = ", ".join(pair.moe for pair in pairs)
    raise UsageError(
        f"{dense} cannot become {shown(into)!r}.", _sentence(reason) if reason else "", f"It can become: {targets}."
    )


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."
