"""A plan with another router: the same tensors but for those of the routers, as a research checkpoint.

What a plan writes for a family is taken as it is. Where a router stood there are the parameters of the new one, drawn
by torch as its paper has them when they are written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moectl.checkpoint.card import inherited
from moectl.checkpoint.expressions import Copy, Expression, Made
from moectl.checkpoint.plan import Make, OutputTensor, Plan, planned
from moectl.checkpoint.source import Checkpoint
from moectl.errors import UsageError
from moectl.families.components import ROUTED, experts_and_top_k
from moectl.integrations.routed.config import with_router
from moectl.integrations.routed.install import check_fit, install
from moectl.layerwise.active import active_of, shares_of
from moectl.layerwise.loading import names_in_memory
from moectl.layerwise.quiet import quiet
from moectl.routers.registry import Entry, find
from moectl.routers.spelling import Named, parse
from moectl.text import escape

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
"""Of what routers hold: torch's types and safetensors' names of them."""

FROM_CONFIG = {"groups": "n_group", "top_groups": "topk_group", "scale": "routed_scaling_factor"}
"""Options whose default is the model's own where its family has them, and what its config calls them."""


def one_router(text: str) -> Named:
    """The router that is written `NAME[:OPTION=VALUE,...]`, if it can be part of a model.

    Raises:
        UsageError: it is none, several, or not for a model.
    """
    found = parse(text)
    if len(found) != 1:
        raise UsageError(f"--router {escape(text)} names {len(found)} routers.", "A model has one.", "Give one.")
    check_fit(found[0].entry)
    return found[0]


def replaces_all(entry: Entry) -> bool:
    """Whether a router takes the place of all of a family's, so that none is left for losses of the family's own."""
    return entry.name != "mod" and entry.kind != "slots"


def cautions(entry: Entry) -> list[str]:
    """What has to be known of a router before its numbers are read."""
    found = []
    if entry.name == "mod":
        found.append(
            "While it is trained, which tokens pass through a layer depends on later ones. In use a predictor decides, "
            "of each token by itself, unless decide=top is given."
        )
    elif not entry.causal:
        found.append(
            f"The router {entry.name} is not causal: where a token goes depends on others that come after it. A loss "
            "on whole texts knows something of what it predicts, and text that is written token by token is routed in "
            "another way than text that is read."
        )
    if not entry.verified:
        found.append(f"The router {entry.name} was written from memory and is unverified.")
    return found


def router_of(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The name and all options of a router as it is put into a model of that config.

    What is not given is the router's own default, but for three things that a model brings along: how many experts a
    token takes (unless the router is made for one), the groups and the scale of families that have them, and the
    size of the vocabulary.

    Raises:
        UsageError: as `one_router`, or there is no such option.
    """
    named = one_router(text)
    own = named.entry.load().Options()
    stated = config.get_text_config(decoder=True)
    defaults = {name: getattr(stated, theirs) for name, theirs in FROM_CONFIG.items() if getattr(stated, theirs, None)}
    defaults["vocab_size"] = stated.vocab_size
    defaults["decide"] = "predictor"  # Mixture-of-Depths: in use no token knows of later ones
    top_k = experts_and_top_k(stated.to_dict())[1]
    if own.top_k != 1 and top_k and named.entry.name != "peer":
        defaults["top_k"] = top_k
    if "groups" not in defaults and "n_group" not in stated.to_dict():
        defaults |= {"groups": 1, "top_groups": 1}
    return {"name": named.entry.name, "options": asdict(named.options(**defaults))}


def plan_of(source: Checkpoint) -> Plan:
    """The plan that writes a checkpoint as it is."""
    tensors = tuple(planned(name, Copy(name), (source,)) for name in source.tensors)
    facts = {"family": source.model_type, "source_family": source.model_type}
    return Plan((source,), tensors, {"method": "copy"}, source.config, facts=facts)


def check_unrouted(config: Mapping[str, Any]) -> None:
    """Refuse another router for a research checkpoint.

    Raises:
        UsageError: the config is of one.
    """
    if config.get("model_type") == ROUTED:
        raise UsageError(
            f"The model is routed by {config['router']['name']} already.",
            "What a second router should take over from it is not known.",
            "Train it as it is, without --router, or give the checkpoint it was made from.",
        )


def routed_plan(plan: Plan, text: str, seed: int = 0) -> Plan:
    """The plan with another router, whose parameters are drawn by the seed.

    A gate of the same shape as the family's begins as that one does.

    Raises:
        InputError: the model has no MoE layers, or their routers cannot be replaced.
        UsageError: as `router_of`, or the model is a research checkpoint already.
    """
    check_unrouted(plan.config)
    config = CONFIG_MAPPING[plan.config["model_type"]].from_dict(dict(plan.config))
    router = router_of(text, config)
    base, routed = _on_meta(config), _on_meta(config)
    with torch.device("meta"):
        parts = install(routed, router)
    before, after = base.state_dict(), routed.state_dict()
    targets = names_in_memory(base, [tensor.name for tensor in plan.tensors])
    added = {name: value for name, value in after.items() if name not in before}
    kept = _kept_gates(plan.tensors, targets, before, added)
    tensors = [tensor for tensor in plan.tensors if targets[tensor.name] not in before.keys() - after.keys()]
    for name, value in sorted(added.items()):
        on_disk = next(iter(revert_weight_conversion(routed, {name: value})))
        group = next(part for part in parts if name.startswith(f"{part}."))
        dtype = "F32" if name in kept else _DTYPES[value.dtype]
        drawn = Made(name, group, dtype, tuple(value.shape))
        tensors.append(planned(on_disk, kept.get(name, drawn), plan.sources, dtype))
    written = json.loads(with_router(config, **router).to_json_string())
    shares = shares_of(written, {tensor.name: tensor.shape for tensor in tensors})
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in tensors if shares.is_parameter(tensor.name)}
    return replace(
        plan,
        tensors=tuple(tensors),
        recipe={**plan.recipe, "router": router, "router_seed": seed},
        config=written,
        make=_drawing(parts, seed),
        files={"README.md": card(plan.sources[0], router)},
        facts={
            **plan.facts,
            "parameters": sum(sizes.values()),
            "active_parameters": None if (active := active_of(shares, sizes)) is None else math.floor(active),
            "router": router["name"],
            "exact": False,
        },
    )


def card(source: Checkpoint, router: Mapping[str, Any]) -> str:
    """The model card of a research checkpoint: what it is, in its first lines, and how it is loaded."""
    entry = find(router["name"])
    papers = ", ".join(
        f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers if paper[0].isdigit()
    )
    options = ", ".join(f"`{name}={value}`" for name, value in router["options"].items())
    lines = [
        "---",
        "tags: [moe, moectl, research]",
        *inherited(source),
        "---",
        "",
        f"# Research checkpoint: {escape(source.name)} with the router {entry.name}",
        "",
        "**No class of transformers has this router, so transformers, vLLM and others refuse the checkpoint.**",
        "It loads with moectl:",
        "",
        "```python",
        "from moectl.integrations.transformers import load",
        "",
        "model = load(path)",
        "```",
        "",
        f"Its MoE layers are routed by {entry.title}{f' ({papers})' if papers else ''}, with {options}.",
    ]
    lines += [line for words in cautions(entry) for line in ("", words)]
    return "\n".join(lines) + "\n"


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model


def _kept_gates(
    tensors: Sequence[OutputTensor],
    targets: Mapping[str, str],
    before: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
) -> dict[str, Expression]:
    """What gates and selection biases of new routers are made of, where the family's have one of the same shape."""
    made = {targets[tensor.name]: tensor.expression for tensor in tensors}
    kept = {}
    for name, value in added.items():
        place, _, leaf = name.rpartition(".router.")
        same = [
            other
            for other, tensor in before.items()
            if other.startswith(f"{place}.")
            and tensor.shape == value.shape
            and other in made
            and leaf in ("weight", "bias")
        ]
        if len(same) == 1:
            kept[name] = made[same[0]]
    return kept


def _drawing(parts: Mapping[str, Callable[[], nn.Module]], seed: int) -> Make:
    """What draws the parameters and buffers of a new module; each module's follow from the seed and its own name."""

    @lru_cache(maxsize=1)
    def drawn(name: str) -> dict[str, np.ndarray[Any, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
            module = parts[name]()
        return {f"{name}.{leaf}": value.numpy() for leaf, value in module.state_dict().items()}

    return drawn
