"""Plan a PESC adapter for a dense model from its config alone: a directory that PEFT loads (arXiv 2401.02731).

Legend for shapes: E experts, R adapter_dim, D hidden_size; r LoRA's rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moectl.checkpoint.dtypes import TORCH_NAMES
from moectl.checkpoint.expressions import Literal, Uniform
from moectl.checkpoint.location import resolve
from moectl.checkpoint.plan import OutputTensor, Plan
from moectl.checkpoint.source import read_json
from moectl.errors import InputError, UsageError
from moectl.families.config import normalised
from moectl.families.registry import DENSE
from moectl.families.shapes import expected_tensors
from moectl.families.spec import DenseFamily, PlainMlp
from moectl.text import escape, shown
from moectl.upcycle.recipe import MAX_EXPERTS, chosen_layers

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
RELEASED = "moe_model.bin"
_ONE_FILE = 1 << 62  # PEFT reads no shards
_WIDEST = 1 << 20


@dataclass(frozen=True, slots=True)
class PescRecipe:
    """What adapters to put behind the FFNs, normalised.

    Attributes:
        experts: adapters per layer.
        top_k: adapters each token is sent to.
        adapter_dim: width of an adapter.
        scale: factor on the adapters' output.
        dropout: where the adapters read the FFN's output, in training.
        aux_loss_coef: weight of the load-balancing loss in training.
        lora_rank, lora_alpha: of LoRA on all linear layers, trained with the adapters; no LoRA with rank 0.
        layers: as `chosen_layers` reads it; LoRA is on all of them.
        dtype: of the stored weights; PEFT trains them in float32 unless it is told otherwise.
        seed: of the routers and of the first matrices of adapters and LoRA.
    """

    experts: int = 8
    top_k: int = 2
    adapter_dim: int = 512
    scale: float = 1.0
    dropout: float = 0.0
    aux_loss_coef: float = 0.01
    lora_rank: int = 0
    lora_alpha: int = 16
    layers: str = "all"
    dtype: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value out of its range.
        """
        if not 1 <= self.top_k <= self.experts <= MAX_EXPERTS:
            raise UsageError(
                f"--top-k {shown(self.top_k)} of --experts {shown(self.experts)} is impossible.",
                f"Each token is sent to top-k different experts, of at most {MAX_EXPERTS}.",
                "Give other numbers, such as --experts 8 --top-k 2.",
            )
        if not 1 <= self.adapter_dim <= _WIDEST:
            raise UsageError(
                f"--adapter-dim {shown(self.adapter_dim)} is not from 1 to {_WIDEST}.", "", "Give one such as 512."
            )
        if not 0 <= self.lora_rank <= _WIDEST:
            raise UsageError(
                f"--lora-rank {shown(self.lora_rank)} is not from 0 to {_WIDEST}.", "", "Give one such as 64."
            )
        if not 1 <= self.lora_alpha <= _WIDEST:
            raise UsageError(
                f"--lora-alpha {shown(self.lora_alpha)} is not from 1 to {_WIDEST}.", "", "Give one such as 16."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {shown(self.dropout)} is not in [0, 1).", "", "Give one such as 0.1.")
        if not abs(self.scale) <= sys.float_info.max:
            raise UsageError(f"--scale {shown(self.scale)} is not finite.", "", "Give one such as 1.")
        if not 0 <= self.aux_loss_coef <= sys.float_info.max:
            raise UsageError(
                f"--aux-loss-coef {shown(self.aux_loss_coef)} is not a finite number of at least 0.", "", "Give 0.01."
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise UsageError(f"--dtype {shown(self.dtype)!r} is not known.", "", "Give bfloat16, float16 or float32.")


@dataclass(frozen=True, slots=True)
class Base:
    """The dense model an adapter is for, by its config.json alone.

    Attributes:
        path: where config.json lies.
        name: what PEFT will load the model by: the Hub id, or the directory's absolute path.
        commit: the Hub commit, or None for a directory.
        config: config.json, normalised.
    """

    path: Path
    name: str
    commit: str | None
    family: DenseFamily
    config: Mapping[str, Any]

    @staticmethod
    def open(model: str, revision: str | None = None) -> Base:
        """Read the config of a directory, a Hub id or `hf://org/name@rev`; of the latter two nothing else is fetched.

        Raises:
            InputError: there is none, its family is not known, its FFN has no gate, or it is a released PESC model.
            MachineError: the Hub cannot be reached.
            UsageError: a revision where there is none to choose.
        """
        if Path(model).name == RELEASED or (Path(model) / RELEASED).is_file():
            raise InputError(
                f"{escape(model)} is a checkpoint of the original PESC release, whose {RELEASED} is a pickle.",
                "Unpickling can run code hidden in the file, so it is never opened.",
                "Convert it where you trust it, as docs/pesc.md says, to a directory that PEFT loads.",
            )
        found = resolve(model, revision, ("config.json",))
        if not (found.path / "config.json").is_file():
            raise InputError(
                f"{escape(str(found.path))} has no config.json.",
                "It says how wide the adapters have to be.",
                "Give the directory or Hub id of a dense model.",
            )
        raw = read_json(found.path / "config.json")
        family = DENSE.get(str(raw.get("model_type")))
        if family is None or isinstance(family.mlp, PlainMlp):
            known = ", ".join(name for name, each in DENSE.items() if not isinstance(each.mlp, PlainMlp))
            raise InputError(
                f"config.json: model_type {shown(raw.get('model_type'))!r} is no dense family with a gated FFN.",
                "Where its FFNs are is not known.",
                f"Known: {known}. For others use PescConfig(target_modules=...), as docs/pesc.md says.",
            )
        name = found.name if found.commit else str(found.path.absolute())
        return Base(found.path, name, found.commit, family, normalised(family, raw))


def plan_pesc(base: Base, recipe: PescRecipe) -> Plan:
    """The plan of an adapter directory: W_up zero, so that the model with it is the dense model bit for bit.

    Routers [E, D] and W_down [E, R, D] are uniform on +-1 / sqrt(D), as the paper's code has them. LoRA's A [r, in] is
    uniform on +-1 / sqrt(in), as PEFT has it, and its B [out, r] zero.

    Raises:
        UsageError: the recipe names no layers of this model.
    """
    hidden, layers = base.config["hidden_size"], base.config["num_hidden_layers"]
    adapted = chosen_layers(recipe.layers, layers)
    ffn = base.family.mlp.down.rsplit(".", 2)[0]
    experts, width = recipe.experts, recipe.adapter_dim
    tensors = []
    for layer in adapted:
        module = f"base_model.model.{ffn.format(layer=layer)}"
        parts: dict[str, Uniform | Literal] = {
            "pesc_router": Uniform((experts, hidden), hidden**-0.5, f"{module}.pesc_router"),
            "pesc_down": Uniform((experts, width, hidden), hidden**-0.5, f"{module}.pesc_down"),
            "pesc_up": Literal((experts, hidden, width), 0.0),
        }
        for name, expression in parts.items():
            tensors.append(OutputTensor(f"{module}.{name}", TORCH_NAMES[recipe.dtype], expression.shape, expression))
    lora = _lora_tensors(base, recipe, {ffn.format(layer=layer) for layer in adapted})
    tensors += lora
    config = {
        "peft_type": "PESC",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.commit,
        "inference_mode": True,
        "num_experts": experts,
        "top_k": recipe.top_k,
        "adapter_dim": width,
        "scale": recipe.scale,
        "adapter_dropout": recipe.dropout,
        "aux_loss_coef": recipe.aux_loss_coef,
        "lora_r": recipe.lora_rank,
        "lora_alpha": recipe.lora_alpha,
        "target_modules": [ffn.rsplit(".", 1)[1]],
        "layers_to_transform": None if len(adapted) == layers else list(adapted),
    }
    digest = hashlib.sha256(json.dumps(dict(base.config), sort_keys=True).encode()).hexdigest()
    recorded = {
        "method": "pesc",
        **asdict(recipe),
        "base": {"name": base.name, "commit": base.commit, "config_sha256": digest},
    }
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    facts = {
        "family": "PESC adapter",
        "source_family": base.family.model_type,
        "parameters": total,
        "active_parameters": total - len(adapted) * (experts - recipe.top_k) * 2 * width * hidden,
    }
    return Plan(
        sources=(),
        tensors=tuple(tensors),
        recipe=recorded,
        config=config,
        seed=recipe.seed,
        shard_bytes=_ONE_FILE,
        files={"README.md": _card(base, recipe)},
        facts=facts,
        weights_file=WEIGHTS_FILE,
        config_file=CONFIG_FILE,
    )


def _lora_tensors(base: Base, recipe: PescRecipe, ffns: set[str]) -> list[OutputTensor]:
    """A and B of every matrix in a layer; PEFT finds those inside an adapted FFN (one of `ffns`) a level deeper."""
    if not recipe.lora_rank:
        return []
    outside = {spec.name for spec in base.family.tensors if "{layer}" not in spec.name}
    tensors = []
    for name, shape in expected_tensors(base.family, base.config):
        if len(shape) != 2 or name in outside:
            continue
        path, leaf = name.removesuffix(".weight").rsplit(".", 1)
        module = f"base_model.model.{path}.{'base_layer.' if path in ffns else ''}{leaf}"
        rows, columns = shape
        first = Uniform((recipe.lora_rank, columns), columns**-0.5, f"{module}.lora_A")
        for part, expression in (("A", first), ("B", Literal((rows, recipe.lora_rank), 0.0))):
            key = f"{module}.lora_{part}.weight"
            tensors.append(OutputTensor(key, TORCH_NAMES[recipe.dtype], expression.shape, expression))
    return tensors


def _card(base: Base, recipe: PescRecipe) -> str:
    name = escape(base.name)
    front = [f"base_model: {name}"] if base.commit else []
    lora = f"and LoRA of rank {recipe.lora_rank} on all linear layers " if recipe.lora_rank else ""
    return "\n".join(
        [
            "---",
            *front,
            "library_name: peft",
            "tags: [peft, pesc, moe, moectl]",
            "---",
            "",
            f"# PESC adapter for {name}",
            "",
            f"{recipe.experts} adapters of width {recipe.adapter_dim} behind each FFN, {recipe.top_k} active per token",
            f"{lora}([arXiv 2401.02731](https://arxiv.org/abs/2401.02731)).",
            "Untrained, it leaves the model as it is, bit for bit: the last matrices are zero.",
            "",
            "```python",
            "import moectl.integrations.pesc",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base_model, path)",
            "```",
            "",
        ]
    )
