"""Architectures."""

from __future__ import annotations

from moectl.routers.entry import Entry

ARCHITECTURES: tuple[Entry, ...] = (
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
