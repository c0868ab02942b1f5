"""Reports of a compression that never was, with numbers that are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moectl.compress.pipeline.report import LayerReport, MatrixReport
from moectl.compress.report.summary import Summary, summary

LAYERS, EXPERTS, WIDTH, HIDDEN = 4, 6, 96, 64
HOSTILE = '</script><img src=x onerror=alert(1)>"\x1b[31m'


def matrix(layer: int, expert: int, kind: str) -> MatrixReport:
    """A matrix whose numbers follow from its place."""
    rows, columns = (2 * WIDTH, HIDDEN) if kind == "gate_up_proj" else (HIDDEN, WIDTH)
    return MatrixReport(
        parameter=f"model.layers.{layer}.mlp.experts.{kind}",
        expert=expert,
        rows=rows,
        columns=columns,
        tokens=200 + 10 * expert + layer,
        looked_at=200 + 10 * expert,
        sparsity=0.8 + 0.01 * expert + (0.05 if kind == "down_proj" else 0.0),
        error=0.1 + 0.01 * layer + 0.001 * expert,
        bits=0.9 + 0.01 * expert,
        factor=1.0,
        cold=False,
        fallback=False,
    )


def reports(**changes: Any) -> list[LayerReport]:
    """All layers, and what lies outside them; `changes` are of expert 1 of layer 2."""
    found = []
    for layer in range(LAYERS):
        matrices = [matrix(layer, expert, kind) for kind in ("gate_up_proj", "down_proj") for expert in range(EXPERTS)]
        if layer == 2:
            matrices = [replace(each, **changes) if each.expert == 1 else each for each in matrices]
        found.append(LayerReport(layer, f"model.layers.{layer}", tuple(matrices), 1.5))
    return [*found, LayerReport(None, "", (), 0.5)]


def sizes() -> dict[str, int]:
    """Bytes of the tensors of an output."""
    found = {"model.embed_tokens.weight": 600, "lm_head.weight": 400, "model.norm.weight": 10}
    for layer in range(LAYERS):
        for kind in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            found |= {f"{name}.about": 16, f"{name}.codes": 5000, f"{name}.counts": 400, f"{name}.levels": 800}
        found[f"model.layers.{layer}.self_attn.q_proj.weight_packed"] = 300
    return found


def parameters() -> frozenset[str]:
    return frozenset(
        f"model.layers.{layer}.mlp.experts.{kind}" for layer in range(LAYERS) for kind in ("gate_up_proj", "down_proj")
    )


def measured(loss_after: float = 2.1, rerouted: float = 0.1, domain: str = "code") -> dict[str, Any]:
    """What an evaluation found: as `Change.to_json` has it."""

    def side(loss: float, difference: float) -> dict[str, Any]:
        return {
            "loss": loss,
            "perplexity": 2.718281828**loss,
            "bits_per_byte": loss / 0.6931,
            "difference": difference,
            "loss_interval": (loss - 0.05, loss + 0.05),
            "bits_per_byte_interval": None,
            "difference_interval": (difference - 0.01, difference + 0.01),
            "tokens": 1000,
        }

    drift = {"tokens": 500, "kl": 0.08, "kl_interval": (0.07, 0.09), "same_next": 0.91}
    domains = {
        name: {"before": side(2.0, 0.0), "after": side(loss, (loss - 2.0) / 0.6931), "drift": drift}
        for name, loss in ((domain, loss_after), ("prose", 2.05), ("sums", 2.06), ("mean", (loss_after + 4.11) / 3))
    }
    return {
        "domains": domains,
        "rerouted": {f"model.layers.{layer}.mlp.experts": rerouted + 0.01 * layer for layer in range(LAYERS)},
    }


def made(found: list[LayerReport] | None = None, **more: Any) -> Summary:
    """The summary of all that."""
    total = sum(sizes().values())
    weights = LAYERS * EXPERTS * 3 * WIDTH * HIDDEN
    facts = {
        "parameters": weights + 700,
        "source_bytes": 2 * (weights + 700),
        "weight_bytes": total,
        "bits_per_parameter": 8 * total / (weights + 700),
        "bits_per_expert_parameter": 8 * (total - 2210) / weights,
        "ratio": 2 * (weights + 700) / total,
    }
    recipe = {"bits": None, "compat": False, "code": "tunstall", "dense": "int8", "export": None}
    given = {"name": "model", "recipe": recipe, "measured": measured(), "about": {"samples": 8}, "peak_bytes": 10**9}
    given |= more
    return summary(
        given.pop("name"),
        reports() if found is None else found,
        facts,
        given.pop("recipe"),
        given.pop("sizes", sizes()),
        parameters(),
        **given,
    )
