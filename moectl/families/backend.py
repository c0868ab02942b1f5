"""Which Mixture-of-Experts families of the installed transformers run on our kernels, read from its source text.

transformers hands an experts module to another implementation where its class is decorated with
`use_experts_implementation`; the arguments of the decorator and a method `_apply_gate` say how the experts compute.
Nothing is imported or built, so the listing takes a fraction of a second and needs no torch.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from moectl.errors import MachineError


@dataclass(frozen=True)
class Gate:
    """A family's own gate as a clamped gated activation (`moe_kernels.Activation`), by the module's attributes.

    Attributes:
        act_fn: the gate half goes through the module's `act_fn`; else through z * sigmoid(alpha * z).
        limit, alpha: names of the module's attributes; empty for none.
        offset: what is added to the up half.
    """

    act_fn: bool = False
    limit: str = ""
    alpha: str = ""
    offset: float = 0.0


GATES: dict[str, Gate] = {
    "BeamExperts": Gate(act_fn=True),  # the plain gate; its casts to float32 are what the kernels do anyway
    "DeepseekV4Experts": Gate(act_fn=True, limit="limit"),
    "Glm5NextTextExperts": Gate(limit="swiglu_limit"),
    "GptOssExperts": Gate(limit="limit", alpha="alpha", offset=1.0),
    "HYV4Experts": Gate(limit="swiglu_limit"),
    "MiniMaxM3VLExperts": Gate(limit="swiglu_limit", alpha="swiglu_alpha", offset=1.0),
    "OpenAIPrivacyFilterExperts": Gate(limit="limit", alpha="alpha", offset=1.0),
}
"""The class that defines `_apply_gate` -> what it computes. A test holds each against the method itself."""

_ELSEWHERE = "its own code runs whatever experts_implementation says"

NOT_DECORATED: dict[str, str] = {
    "dbrx": "its experts' three matrices are flat [experts * width, hidden]; " + _ELSEWHERE,
    "doge": "each of its thousands of experts is one row of an embedding; " + _ELSEWHERE,
    "jetmoe": "its experts are two separate linear maps, in attention too; " + _ELSEWHERE,
    "llama4": "it multiplies an expert's input, not its output, by the routing weight; " + _ELSEWHERE,
    "longcat_flash": "some of its experts are the identity; " + _ELSEWHERE,
    "nllb_moe": "its experts are modules of their own and drop tokens over capacity; " + _ELSEWHERE,
    "step3p7": "its experts are not open to other implementations; " + _ELSEWHERE,
    "switch_transformers": "its experts are modules of their own and drop tokens over capacity; " + _ELSEWHERE,
    "vitpose_backbone": "its experts are picked by data set, without a router; " + _ELSEWHERE,
}
"""Families with experts whose class is not decorated -> why, and what that means. A test checks that these are all."""


@dataclass(frozen=True)
class ExpertsClass:
    """One decorated class: the arguments of its decorator, and whether it has a gate of its own."""

    family: str
    name: str
    own_gate: bool = False
    has_gate: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True

    @property
    def layout(self) -> str:
        """What is unusual about its weights, in words; empty for the common layout."""
        return ", ".join(
            word
            for word, holds in (
                ("no gate", not self.has_gate),
                ("biases", self.has_bias),
                ("transposed", self.is_transposed),
                ("interleaved", not self.is_concatenated),
                ("clamped", self.own_gate and bool(GATES.get(self.name, Gate()).limit)),
            )
            if holds
        )

    @property
    def unfused(self) -> str:
        """Why its two projections and what stands between them are separate calls; empty where they are not."""
        if self.has_post_expert_norm:
            return "a norm stands between the down-projection and the routing weights"
        if self.own_gate and self.name not in GATES:
            return "its gate is a function of its own"
        return ""


def experts_classes(models: Path | None = None) -> dict[str, list[ExpertsClass]]:
    """Every family with experts in `models` (default: the installed transformers) -> its decorated classes."""
    return {path.parent.name: _decorated_in(path) for path in _modeling_files(models)}


def backend_rows(models: Path | None = None) -> list[dict[str, str]]:
    """One row per class that is covered and per family that is refused, by family."""
    rows = []
    for family, classes in experts_classes(models).items():
        for item in classes:
            kind = "unfused" if item.unfused else "fused"
            rows.append(_row(family, item.name, kind, item.layout, item.unfused))
        if not classes:
            reason = NOT_DECORATED.get(family, "its experts are not open to other implementations; " + _ELSEWHERE)
            rows.append(_row(family, "", "refused", "", reason))
    return rows


def _row(family: str, experts: str, backend: str, layout: str, because: str) -> dict[str, str]:
    return {"family": family, "experts": experts, "backend": backend, "layout": layout, "because": because}


def transformers_version() -> str:
    """The version of the installed transformers, without importing it."""
    return metadata.version("transformers")


def _modeling_files(models: Path | None) -> list[Path]:
    """The modeling files with experts in them, sorted."""
    experts = re.compile(r"^class \w*Experts?\w*\(|\.num_(local_)?experts\b", re.MULTILINE)
    found = sorted((models or _installed_models()).glob("*/modeling_*.py"))
    return [path for path in found if experts.search(path.read_text(encoding="utf-8"))]


def _decorated_in(path: Path) -> list[ExpertsClass]:
    text = path.read_text(encoding="utf-8")
    if "@use_experts_implementation" not in text:
        return []
    found = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            name = call.func if call else decorator
            if isinstance(name, ast.Name) and name.id == "use_experts_implementation":
                said = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg} if call else {}
                own_gate = any(isinstance(item, ast.FunctionDef) and item.name == "_apply_gate" for item in node.body)
                found.append(ExpertsClass(path.parent.name, node.name, own_gate, **said))
    return found


def _installed_models() -> Path:
    spec = util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise MachineError("transformers is not installed.", "", "pip install transformers")
    return Path(spec.submodule_search_locations[0]) / "models"
