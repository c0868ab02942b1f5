"""Where the experts of a checkpoint lie on disk: which tensors go with an expert, and along which dimension."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.source import Checkpoint
from moectl.compress.prune.families import PRUNABLE, REFUSED
from moectl.errors import InputError
from moectl.families.components import PER_EXPERT
from moectl.text import escape, shown

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The config fields that count routed experts; a config may have several."""
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ROUTER = re.compile(r"(?:gate|router)(?:\.(?:gate|wg|layer|proj))?\.weight")
_BESIDE = re.compile(r"(?:gate|router)\.bias|(?:\w+\.)*(?:e_score_correction_bias|expert_bias|per_expert_scale)")
_FUSED = re.compile(r"experts\.(?!\d)\w+(?:\.weight)?|(?:input|output)_linear\.weight")
_BLOCK = r"(?:^|.*\.)layers\.\d+\.(?:(?:mlp|ffn|feed_forward|block_sparse_moe|mixer|moe)\.)?"
_MTP = "mtp."


@dataclass(frozen=True)
class Layout:
    """The experts of a checkpoint.

    Attributes:
        experts, top_k: in every MoE layer, and how many of them a token is given.
        groups, top_groups: in how many groups they stand, and how many of these a token can choose from.
        layers: the numbers of the MoE layers.
        numbered: the tensors of one expert: name -> (layer, expert).
        sliced: the tensors of all experts of a layer: name -> (layer, dimension of the experts).
        routers: the names of the router weights among them, [E, ...].
        extra: tensors of layers for predicting several tokens, which have experts that nothing is measured of.
    """

    source: Checkpoint
    experts: int
    top_k: int
    groups: int
    top_groups: int
    layers: tuple[int, ...]
    numbered: dict[str, tuple[int, int]]
    sliced: dict[str, tuple[int, int]]
    routers: tuple[str, ...]
    extra: frozenset[str]

    @property
    def identity(self) -> str:
        """sha256 of all routers: what tells a model from another whose tensors have the same names and shapes."""
        digest = hashlib.sha256(f"{self.experts} {self.top_k}".encode())
        for name in sorted(self.routers):
            digest.update(name.encode())
            for piece in self.source.chunks(self.source.tensors[name]):
                digest.update(piece)
        return digest.hexdigest()

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert in each layer, all layers together; router rows not counted."""
        tensors = self.source.tensors
        numbered = sum(math.prod(tensors[name].shape) for name in self.numbered)
        fused = sum(math.prod(tensors[name].shape) for name in self.sliced if _FUSED.search(name))
        return (numbered + fused) // self.experts

    def matrices(self) -> Iterator[tuple[int, int, TensorRef]]:
        """(layer, expert, matrix) for every matrix of every expert; biases and scales are left out."""
        for name, (layer, expert) in self.numbered.items():
            if len(self.source.tensors[name].shape) == 2:
                yield layer, expert, self.source.tensors[name]
        for name, (layer, _) in self.sliced.items():
            ref = self.source.tensors[name]
            if len(ref.shape) == 3:
                size = ref.nbytes // self.experts
                for expert in range(self.experts):
                    begin = ref.offset + expert * size
                    yield layer, expert, TensorRef(ref.name, ref.dtype, ref.shape[1:], ref.file, begin, size)


def layer_of(name: str) -> int | None:
    """The number of the layer a tensor belongs to."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layout_of(source: Checkpoint) -> Layout:
    """Find the experts of a checkpoint. Reads no weights.

    Raises:
        InputError: the family cannot be pruned, or tensors and config do not belong together.
    """
    from moectl.layerwise.skeleton import read_config

    model_type = source.model_type
    if model_type not in PRUNABLE:
        reason = REFUSED.get(model_type, "its experts are not known to be removable one by one")
        raise InputError(
            f"{escape(source.name)}: model_type {shown(model_type)!r} cannot be pruned.",
            f"{reason[0].upper()}{reason[1:]}.",
            f"Known: {', '.join(PRUNABLE)}.",
        )
    config = read_config(source)
    experts, top_k = _first(config, COUNTS), _first(config, _TOP_K)
    if not experts or not top_k:
        raise _bad(source, "config.json", "does not say how many experts there are and how many a token is given")
    groups = 1 if getattr(config, "topk_method", "") == "greedy" else _first(config, _GROUPS) or 1
    numbered: dict[str, tuple[int, int]] = {}
    sliced: dict[str, tuple[int, int]] = {}
    routers: list[str] = []
    for name, ref in source.tensors.items():
        layer = layer_of(name)
        if layer is None:
            continue
        if single := PER_EXPERT.fullmatch(name):
            numbered[name] = layer, int(single["expert"])
            continue
        block = re.match(_BLOCK, name)
        rest = name[block.end() :] if block else ""
        if _ROUTER.fullmatch(rest):
            routers.append(name)
        elif not _BESIDE.fullmatch(rest) and not (_FUSED.fullmatch(rest) and ref.shape[:1] == (experts,)):
            continue
        sliced[name] = layer, 1 if ref.shape == (1, experts) else 0
        if experts not in ref.shape[:2] or ref.shape[sliced[name][1]] != experts:
            raise _bad(source, name, f"has shape {list(ref.shape)}, expected {experts} entries, one for each expert")
    layers = {layer for name, (layer, _) in (*numbered.items(), *sliced.items()) if name not in routers}
    layers &= {layer for name in routers if (layer := layer_of(name)) is not None}
    _check_whole(source, numbered, experts)
    last = config.num_hidden_layers
    mtp = {layer for layer in layers if layer >= last}
    extra = frozenset(name for name in source.tensors if name.startswith(_MTP) or layer_of(name) in mtp)
    inner = {name: place for name, place in sliced.items() if name not in extra and place[0] in layers}
    return Layout(
        source,
        experts,
        top_k,
        groups,
        (getattr(config, "topk_group", None) or groups) if groups > 1 else 1,
        tuple(sorted(layers - mtp)),
        {name: place for name, place in numbered.items() if name not in extra},
        inner,
        tuple(name for name in routers if name in inner),
        extra,
    )


def _check_whole(source: Checkpoint, numbered: dict[str, tuple[int, int]], experts: int) -> None:
    """Every matrix that one expert has, all have."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, (_, expert) in numbered.items():
        match = PER_EXPERT.fullmatch(name)
        assert match is not None
        found[match["block"], match["matrix"]].add(expert)
    for (block, matrix), there in found.items():
        odd = sorted(there ^ set(range(experts)))
        if odd:
            what = "is missing" if odd[0] < experts else f"is one too many: the config counts {experts} experts"
            raise _bad(source, f"{block}.{odd[0]}.{matrix}", what)


def _first(config: Any, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _bad(source: Checkpoint, name: str, what: str) -> InputError:
    ref = source.tensors.get(name)
    where = ref.file if ref else source.path
    return InputError(
        f"{escape(str(where))}: {escape(name)} {what}.",
        "Experts can be removed only where every tensor that belongs to them is known.",
        "Check that config.json belongs to these weights (`moectl inspect`), or fetch the checkpoint again.",
    )
