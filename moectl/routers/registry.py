"""Every router: what it is called, what it needs, and what its formula was checked against. Imports none of them.

A router without a `source` was written from memory and is *unverified*: it is offered, labelled so, and not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from moectl.errors import UsageError
from moectl.text import shown

Kind = Literal["router", "slots", "layer"]
Need = Literal["logits", "hidden", "tokens", "tasks", "modalities", "nothing"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table.

    Attributes:
        name: on the command line.
        title: what its papers call it.
        papers: arXiv ids, or the venue where there is none.
        where: module and class.
        needs: what the choice is computed from. `logits`: of a linear gate, so that a trace of any model can be routed
            again; `hidden`: a gate of its own, over hidden states.
        causal: whether, in use and with its own defaults, where a token goes does not depend on later tokens.
        trainable: whether weights have a gradient to what the router was given.
        source: the equation or code that the formula was checked against; empty: from memory.
        same_as: the transformers class that it equals, by a test.
        kind: `router` returns a Routing, `slots` a Slots; a `layer` is a whole module, whose routing is not apart.
    """

    name: str
    title: str
    papers: tuple[str, ...]
    where: str
    needs: tuple[Need, ...] = ("logits",)
    causal: bool = True
    trainable: bool = True
    source: str = ""
    same_as: str = ""
    kind: Kind = "router"

    @property
    def verified(self) -> bool:
        """Whether its formula was checked against a source."""
        return bool(self.source)

    def load(self) -> Any:
        """The class."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"moectl.routers.{module}"), name)


ROUTERS: tuple[Entry, ...] = (
    # Top-k of a softmax or sigmoid, with losses, capacities, biases, groups
    Entry(
        "noisy-top-k",
        "Noisy top-k gating",
        ("1701.06538",),
        "noisy_top_k:NoisyTopK",
        needs=("hidden",),
        source="laekov/fastmoe fmoe/gates/noisy_gate.py",
    ),
    Entry(
        "gshard",
        "GShard top-2",
        ("2006.16668",),
        "gshard:GShard",
        causal=False,
        source="tensorflow/mesh mesh_tensorflow/transformer/moe.py `_top_2_gating`",
        same_as="NllbMoeTop2Router",
    ),
    Entry(
        "switch",
        "Switch Transformer",
        ("2101.03961",),
        "switch:Switch",
        source="transformers SwitchTransformersTop1Router",
        same_as="SwitchTransformersTop1Router",
    ),
    Entry(
        "st-moe",
        "ST-MoE",
        ("2202.08906",),
        "st_moe:StMoe",
        causal=False,
        source="tensorflow/mesh mesh_tensorflow/transformer/moe.py `set_default_moe_hparams`",
    ),
    Entry(
        "v-moe",
        "V-MoE, batch prioritised routing",
        ("2106.05974",),
        "v_moe:VMoe",
        causal=False,
        source="google-research/vmoe vmoe/nn/routing.py, vmoe/moe.py",
    ),
    Entry(
        "mixtral",
        "Mixtral",
        ("2401.04088",),
        "softmax_top_k:Mixtral",
        source="transformers MixtralTopKRouter",
        same_as="MixtralTopKRouter",
    ),
    Entry(
        "olmoe",
        "OLMoE",
        ("2409.02060",),
        "softmax_top_k:Olmoe",
        source="transformers OlmoeTopKRouter",
        same_as="OlmoeTopKRouter, Qwen3MoeTopKRouter",
    ),
    Entry(
        "gpt-oss",
        "Softmax over the chosen (gpt-oss, Granite, JetMoe)",
        (),
        "softmax_top_k:GptOss",
        source="transformers GptOssTopKRouter, GraniteMoeTopKRouter",
        same_as="GptOssTopKRouter, GraniteMoeTopKRouter",
    ),
    Entry(
        "llama4",
        "Llama 4, sigmoid of the chosen",
        (),
        "softmax_top_k:Llama4",
        source="transformers Llama4Router",
        same_as="Llama4Router",
    ),
    Entry(
        "gemma4",
        "Gemma 4",
        (),
        "gemma4:Gemma4",
        needs=("hidden",),
        source="transformers Gemma4TextRouter",
        same_as="Gemma4TextRouter",
    ),
    Entry(
        "inkling",
        "Inkling, shared experts in the router",
        (),
        "inkling:Inkling",
        source="transformers InklingTopkRouter",
        same_as="InklingTopkRouter",
    ),
    Entry(
        "deepseek-moe",
        "DeepSeekMoE",
        ("2401.06066",),
        "deepseek_moe:DeepSeekMoe",
        source="deepseek-ai/DeepSeek-VL2 deepseek_vl2/models/modeling_deepseek.py `MoEGate`",
    ),
    Entry(
        "deepseek-v2",
        "DeepSeek-V2, device-limited",
        ("2405.04434",),
        "deepseek_v2:DeepSeekV2",
        source="transformers DeepseekV2TopkRouter",
        same_as="DeepseekV2TopkRouter",
    ),
    Entry(
        "deepseek-v3",
        "DeepSeek-V3, node-limited and bias-balanced",
        ("2412.19437",),
        "deepseek_v3:DeepSeekV3",
        source="transformers DeepseekV3TopkRouter; NVIDIA/Megatron-LM `get_updated_expert_bias`",
        same_as="DeepseekV3TopkRouter",
    ),
    Entry(
        "loss-free",
        "Auxiliary-loss-free balancing",
        ("2408.15664",),
        "deepseek_v3:LossFree",
        source="NVIDIA/Megatron-LM `get_updated_expert_bias`",
    ),
    Entry(
        "quantile",
        "Quantile balancing (Megatron-LM)",
        (),
        "quantile:Quantile",
        source="NVIDIA/Megatron-LM `qb_dual_update`, `_update_router_qb_beta`",
    ),
    Entry(
        "minimax-01",
        "MiniMax-01, capacity with a global view",
        ("2501.08313",),
        "minimax_01:MiniMax01",
        causal=False,
        source="transformers MiniMaxTopKRouter",
        same_as="MiniMaxTopKRouter",
    ),
    Entry(
        "topology",
        "FasterMoE topology-aware gate",
        ("PPoPP 2022",),
        "topology:Topology",
        causal=False,
        source="laekov/fastmoe fmoe/gates/faster_gate.py",
    ),
    Entry(
        "longcat",
        "LongCat, zero-computation experts",
        ("2509.01322",),
        "longcat:LongCat",
        source="transformers LongcatFlashTopkRouter",
        same_as="LongcatFlashTopkRouter",
    ),
    Entry(
        "moe-plus-plus",
        "MoE++, zero, copy and constant experts",
        ("2410.07348",),
        "moe_plus_plus:MoePlusPlus",
        source="SkyworkAI/MoE-plus-plus moe_plus_plus_layer.py",
    ),
    Entry(
        "zaya",
        "Zaya, MLP router with a skip expert",
        (),
        "zaya:Zaya",
        needs=("hidden",),
        source="transformers ZayaRouter",
        same_as="ZayaRouter",
    ),
    Entry(
        "grin",
        "GRIN, SparseMixer-v2",
        ("2409.12136",),
        "grin:Grin",
        source="transformers PhimoeTopKRouter",
        same_as="PhimoeTopKRouter",
    ),
    # Assignments, tables, and experts that choose
    Entry(
        "base",
        "BASE layers",
        ("2103.16716",),
        "base:Base",
        source="facebookresearch/fairseq fairseq/modules/base_layer.py",
    ),
    Entry(
        "s-base",
        "Sinkhorn (S-BASE)",
        ("2202.01169",),
        "s_base:SBase",
        source="NVIDIA/Megatron-LM `sinkhorn`, `sinkhorn_load_balancing`",
    ),
    Entry("kool", "Unbiased gradients by balanced assignment", ("2109.11817",), "kool:Kool"),
    Entry(
        "hash",
        "Hash layers",
        ("2106.04426",),
        "hashing:Hash",
        needs=("tokens",),
        trainable=False,
        source="facebookresearch/ParlAI projects/params_vs_compute/hash_ladder/hash_ladder.py",
    ),
    Entry("multihash", "MultiHash layers", ("2106.04426",), "hashing:MultiHash", needs=("tokens",), trainable=False),
    Entry("mowe", "Mixture of Word Experts", ("2311.10768",), "hashing:Mowe", needs=("tokens",), trainable=False),
    Entry(
        "deepseek-v4-hash",
        "DeepSeek-V4, hashed layers",
        (),
        "hashing:DeepSeekV4Hash",
        needs=("logits", "tokens"),
        source="transformers DeepseekV4HashRouter",
        same_as="DeepseekV4HashRouter",
    ),
    Entry(
        "expert-choice",
        "Expert choice",
        ("2202.09368",),
        "expert_choice:ExpertChoice",
        causal=False,
        source="google/flaxformer flaxformer/architectures/moe/routing.py `ExpertsChooseMaskedRouter`",
    ),
    Entry(
        "soft-moe",
        "Soft MoE",
        ("2308.00951",),
        "soft_moe:SoftMoe",
        needs=("hidden",),
        causal=False,
        source="google-research/vmoe vmoe/projects/soft_moe/router.py",
        kind="slots",
    ),
    Entry(
        "mod",
        "Mixture-of-Depths",
        ("2404.02258",),
        "mod:Mod",
        needs=("hidden",),
        causal=False,
        source="astramind-ai/Mixture-of-depths MoD/MoD.py; sramshetty/mixture-of-depths routing_transformer.py",
    ),
    Entry(
        "mone",
        "Mixture of Nested Experts",
        ("2407.19985",),
        "mone:Mone",
        causal=False,
        source="arXiv 2407.19985 eq. 1-3 and algorithm 1",
    ),
    Entry(
        "prototyping",
        "M6-T expert prototyping",
        ("2105.15082",),
        "prototyping:Prototyping",
        source="Hsword/Hetu python/hetu/layers/KTop1Gate.py",
    ),
    Entry(
        "moec",
        "Mixture of Expert Clusters",
        ("2207.09094",),
        "moec:Moec",
        source="xy980523/MoEc_model `top1gating`, `Top1Gate`, `MOELayer`",
    ),
    Entry("rectify", "Rectify-Router", ("2402.12399",), "rectify:Rectify", causal=False),
    Entry(
        "e3",
        "Partitioned ensembles (E3)",
        ("2110.03360",),
        "e3:E3",
        source="google-research/vmoe vmoe/nn/ensemble_routing.py",
    ),
    Entry(
        "sam",
        "SAM, switch and mixture",
        ("2110.07431",),
        "sam:Sam",
        causal=False,
        source="Hsword/Hetu python/hetu/layers/SAMGate.py, src/ops/SamGroupSum.cu, src/ops/SamMax.cu",
    ),
    # Gates of another form
    Entry(
        "adaptive-mixtures",
        "Adaptive mixtures of local experts",
        ("Jacobs et al., 1991",),
        "adaptive_mixtures:AdaptiveMixtures",
        source="median-research-group/LibMTL LibMTL/architecture/MMoE.py (one gate of it)",
    ),
    Entry(
        "dselect-k",
        "DSelect-k",
        ("2106.03760",),
        "dselect_k:DSelectK",
        needs=("hidden",),
        source="google-research/google-research dselect_k_moe/dselect_k_moe.py",
    ),
    Entry(
        "thor",
        "THOR, stochastic experts",
        ("2110.04260",),
        "thor:Thor",
        needs=("nothing",),
        trainable=False,
        source="microsoft/Stochastic-Mixture-of-Experts thor/transformer_thor_layer.py, thor/translation_thor.py",
    ),
    Entry(
        "stable-moe",
        "StableMoE",
        ("2204.08396",),
        "stable_moe:StableMoe",
        needs=("hidden", "tokens"),
        source="Hunter-DDM/stablemoe fairseq/modules/moe_layer.py, fairseq/criterions/xentropy_with_aux_loss.py",
    ),
    Entry(
        "evo-moe",
        "EvoMoE, dense to sparse",
        ("2112.14397",),
        "evo_moe:EvoMoe",
        source="codecaution/EvoMoE fairseq/modules/moe/topkgate.py",
    ),
    Entry(
        "x-moe",
        "X-MoE, cosine",
        ("2204.09179",),
        "x_moe:XMoe",
        needs=("hidden",),
        source="microsoft/torchscale torchscale/component/xmoe/routing.py, and the fairseq gate that it comes from",
    ),
    Entry(
        "tutel-cosine",
        "Tutel cosine top-k",
        ("2206.03382",),
        "x_moe:TutelCosine",
        needs=("hidden",),
        source="microsoft/Tutel tutel/gates/cosine_top.py, tutel/impls/fast_dispatch.py",
    ),
    Entry(
        "yuan",
        "Yuan 2.0-M32 attention router",
        ("2405.17976",),
        "yuan:Yuan",
        needs=("hidden",),
        source="IEIT-Yuan/Yuan2.0-M32 vllm/vllm/model_executor/models/yuan.py",
    ),
    Entry(
        "peer",
        "PEER, product keys",
        ("2407.04153",),
        "peer:Peer",
        needs=("hidden",),
        source="lucidrains/PEER-pytorch PEER_pytorch/PEER.py",
        same_as="DogeCDMoE, given its own scores",
    ),
    Entry(
        "remoe",
        "ReMoE",
        ("2412.14711",),
        "remoe:ReMoe",
        source="Fsoft-AIC/LibMoE moe_model/model/moe/remoe.py; l1_reg_load_balancing of Megatron-LM forks",
    ),
    Entry(
        "dynmoe",
        "DynMoE",
        ("2405.14297",),
        "dynmoe:DynMoe",
        needs=("hidden",),
        source="LINs-lab/DynMoE DeepSpeed-0.9.5/deepspeed/moe/sharded_moe.py, loss.py",
    ),
    Entry(
        "top-p",
        "Top-p (harder tasks need more experts)",
        ("2403.07652",),
        "top_p:TopP",
        source="ZhenweiAn/Dynamic_MoE modeling/modeling_moe.py",
    ),
    Entry(
        "sparse-is-enough",
        "Controller of Scaling Transformers",
        ("2111.12763",),
        "sparse_is_enough:SparseIsEnough",
        needs=("hidden",),
        source="google/trax trax/layers/research/sparsity.py",
    ),
    # Tasks, domains, modalities, attention heads
    Entry(
        "task-level",
        "Task-level routing",
        ("2110.03742",),
        "task_level:TaskLevel",
        needs=("tasks",),
        causal=False,
        source="arXiv 2110.03742, section 3.1",
    ),
    Entry("mt-tag", "Task-aware gating (MT-TaG)", ("2204.07689",), "task_level:MtTag", needs=("hidden", "tasks")),
    Entry(
        "demix",
        "DEMix layers",
        ("2108.05036",),
        "demix:DeMix",
        needs=("tasks",),
        trainable=False,
        source="kernelmachine/demix fairseq/sequence_scorer.py, fairseq_cli/ensemble_eval_lm.py",
    ),
    Entry(
        "uni-perceiver",
        "Uni-Perceiver-MoE, attribute routing",
        ("2206.04674",),
        "uni_perceiver:UniPerceiver",
        needs=("tasks", "modalities"),
        causal=False,
        source="fundamentalvision/Uni-Perceiver uniperceiver/task_moe/gate.py",
    ),
    Entry(
        "adamv-moe",
        "AdaMV-MoE",
        ("ICCV 2023",),
        "adamv_moe:AdaMvMoe",
        needs=("hidden", "tasks"),
        source="google-research/google-research moe_mtl/router/router.py, moe_mtl/main/trainer_utils.py",
    ),
    Entry(
        "limoe",
        "LIMoE",
        ("2206.02770",),
        "limoe:Limoe",
        needs=("logits", "modalities"),
        causal=False,
    ),
    Entry(
        "moa",
        "Mixture of Attention Heads",
        ("2210.05144",),
        "moa:Moa",
        source="yikangshen/MoA moa_layer/parallel_linear/moe.py",
        same_as="JetMoeTopKGating",
    ),
    Entry(
        "switchhead",
        "SwitchHead",
        ("2312.07987",),
        "switchhead:SwitchHead",
        needs=("hidden",),
        source="RobertCsordas/switchhead switchhead/switchhead.py",
    ),
    # Architectures
    Entry(
        "moa-attention",
        "Mixture of Attention Heads, the layer",
        ("2210.05144",),
        "layers.attention:MoaAttention",
        needs=("hidden",),
        source="yikangshen/MoA moa_layer/moa_attention.py",
        same_as="JetMoeMoA",
        kind="layer",
    ),
    Entry(
        "switchhead-attention",
        "SwitchHead, the layer",
        ("2312.07987",),
        "layers.attention:SwitchHeadAttention",
        needs=("hidden",),
        source="RobertCsordas/switchhead switchhead/switchhead.py",
        kind="layer",
    ),
    Entry(
        "mot",
        "Mixture-of-Transformers",
        ("2411.04996",),
        "layers.mot:MixtureOfTransformers",
        needs=("hidden", "modalities"),
        source="facebookresearch/Mixture-of-Transformers README, src/simple_ModalityUntied*.py",
        kind="layer",
    ),
    Entry("smlp", "sMLP", ("2203.06850",), "layers.smlp:SparseMlp", needs=("hidden",), kind="layer"),
    Entry(
        "cross-token",
        "Cross-token sparse MLP",
        ("2109.02008",),
        "layers.cross_token:CrossToken",
        needs=("hidden",),
        causal=False,
        kind="layer",
    ),
    Entry(
        "widenet",
        "WideNet",
        ("2107.11817",),
        "layers.widenet:WideNet",
        needs=("hidden",),
        causal=False,
        source="XueFuzhao/WideNet_Code widenet/modeling.py, widenet/model_configs.py",
        kind="layer",
    ),
    Entry(
        "mpoe",
        "MPOE",
        ("2203.01104",),
        "layers.mpoe:MpoExperts",
        needs=("hidden",),
        source="lpyhdzx/MPOE third_party/third_party/compress_tools/mixture_of_experts.py",
        kind="layer",
    ),
    Entry(
        "mmoe",
        "Multi-gate mixture of experts",
        ("KDD 2018",),
        "layers.mmoe:Mmoe",
        needs=("hidden", "tasks"),
        source="facebookresearch/AdaTT mtl_lib.py",
        kind="layer",
    ),
    Entry(
        "ple",
        "Progressive layered extraction",
        ("RecSys 2020",),
        "layers.mmoe:Ple",
        needs=("hidden", "tasks"),
        source="facebookresearch/AdaTT mtl_lib.py",
        kind="layer",
    ),
)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UsageError: there is none.
    """
    entry = next((entry for entry in ROUTERS if entry.name == name), None)
    if entry is None:
        raise UsageError(f"There is no router {shown(name)!r}.", "", f"Give one of {', '.join(names())}.")
    return entry


def names(kind: Kind = "router") -> Iterator[str]:
    """Of all entries of a kind."""
    return (entry.name for entry in ROUTERS if entry.kind == kind)
