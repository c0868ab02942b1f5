"""Tasks, domains, modalities, attention heads."""

from __future__ import annotations

from moectl.routers.entry import Entry

TASKS: tuple[Entry, ...] = (
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
        source="arXiv 2206.02770 on the threshold, quoted in koayon/ml-implementations moet_experiment/hf_model.py",
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
)
