"""Routers that transformers has too choose the same experts, and weigh them the same, on random inputs.

Legend: T tokens, D hidden, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from installed import needs
from torch import Tensor, nn

from moectl.routers.protocol import NO_EXPERT, Context, Router
from moectl.routers.registry import find

T, D, E, K = 40, 12, 16, 3
CONFIG: dict[str, Any] = {
    "hidden_size": D,
    "num_experts_per_tok": K,
    "top_k_experts": K,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "n_shared_experts": 2,
    "zero_expert_num": 5,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "route_scale": 8.0,
    "router_hidden_size": 8,
    "router_jitter_noise": 0.05,
    "input_jitter_noise": 0.0,
    "rms_norm_eps": 1e-6,
}
GROUPS = {"groups": 4, "top_groups": 2}


@dataclass(frozen=True)
class Twin:
    """A class of transformers, the router that is the same, and what differs between their options and names.

    Attributes:
        module: under `transformers.models`.
        renamed: its parameters and buffers by other names than ours.
        absent: of ours, what it does not have and what stays as it begins.
    """

    module: str
    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether this transformers has it."""
        module = f"transformers.models.{self.module}"
        return bool(find_spec(module)) and hasattr(import_module(f"{module}.modeling_{self.module}"), self.kind)

    def theirs(self) -> Any:
        """The module of transformers, with random parameters and buffers."""
        torch.manual_seed(1)
        kind = getattr(import_module(f"transformers.models.{self.module}.modeling_{self.module}"), self.kind)
        config = SimpleNamespace(**{**CONFIG, **self.config})
        made = (kind(config, layer_idx=0) if self.module == "zaya" else kind(config)).eval()
        with torch.no_grad():
            for value in [*made.parameters(), *made.buffers()]:
                value.normal_()
        return made

    def ours(self, theirs: nn.Module) -> Router:
        """The router, with the same."""
        kind = find(self.name).load()
        made: Router = kind(D, E, kind.Options(**{"top_k": K, **self.options}))
        values = {self.renamed.get(name, name): value for name, value in theirs.state_dict().items()}
        found = made.load_state_dict(values, strict=False)
        assert (tuple(found.missing_keys), found.unexpected_keys) == (self.absent, [])
        return made


BIAS = {"e_score_correction_bias": "bias"}
TWINS = [
    Twin("mixtral", "MixtralTopKRouter", "mixtral"),
    Twin("minimax", "MiniMaxTopKRouter", "minimax-01", {"capacity_factor": 0.0}),
    Twin("olmoe", "OlmoeTopKRouter", "olmoe", config={"norm_topk_prob": False}),
    Twin("qwen3_moe", "Qwen3MoeTopKRouter", "olmoe", {"normalize": True}),
    Twin("gpt_oss", "GptOssTopKRouter", "gpt-oss"),
    Twin("granitemoe", "GraniteMoeTopKRouter", "gpt-oss", absent=("bias",)),
    Twin("llama4", "Llama4Router", "llama4"),
    Twin("gemma4", "Gemma4TextRouter", "gemma4", renamed={"proj.weight": "weight"}),
    Twin("inkling", "InklingTopkRouter", "inkling", renamed=BIAS),
    Twin("deepseek_v2", "DeepseekV2TopkRouter", "deepseek-v2", {**GROUPS, "scale": 2.5}),
    Twin("deepseek_v3", "DeepseekV3TopkRouter", "deepseek-v3", GROUPS, renamed=BIAS),
    Twin(
        "longcat_flash",
        "LongcatFlashTopkRouter",
        "longcat",
        options={"zero_experts": 5, "scale": 2.5},
        renamed={**BIAS, "classifier.weight": "weight"},
    ),
    Twin(
        "zaya",
        "ZayaRouter",
        "zaya",
        options={"router_size": 8, "epsilon": 1e-6},
        renamed={
            "balancing_biases": "bias",
            "router_mlp.norm.weight": "norm",
            **{f"router_mlp.{name}": name for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
            "router_mlp.out_proj.weight": "out_proj.weight",
        },
    ),
    Twin("phimoe", "PhimoeTopKRouter", "grin", {"top_k": 2, "threshold": 0.05}, {"num_experts_per_tok": 2}),
]
INSTALLED = [twin for twin in TWINS if twin.installed]


def chosen(found: Any) -> tuple[Tensor, Tensor]:
    """Weights and indices [T, K] among what a class of transformers returns, in whatever order."""
    index_TK = next(part for part in found if not part.is_floating_point())
    weight_TK = [part for part in found if part.is_floating_point() and part.shape == index_TK.shape][-1]
    return weight_TK, index_TK


def dense(weight_TK: Tensor, index_TK: Tensor) -> Tensor:
    """[T, E + 1]: each expert's weight, 0 where it is not chosen; choices of nobody in the last column."""
    return torch.zeros(len(index_TK), E + 9).scatter_add(1, index_TK % (E + 9), weight_TK)


@pytest.mark.parametrize("twin", INSTALLED, ids=[twin.kind for twin in INSTALLED])
def test_a_twin_chooses_and_weighs_the_same(twin: Twin) -> None:
    theirs = twin.theirs()
    hidden_TD = torch.randn(T, D)
    with torch.no_grad():
        found, ours = theirs(hidden_TD[None] if twin.module == "zaya" else hidden_TD), twin.ours(theirs)
        routing = ours(hidden_TD)
    if twin.module == "llama4":  # scores of all experts, 0 where one is not chosen
        weight_TK, index_TK = found[0].topk(K)
    else:
        weight_TK, index_TK = chosen(found)
    if twin.module == "inkling":  # its shared experts are returned apart
        weight_TK, index_TK = (
            torch.cat([weight_TK, found[3]], 1),
            torch.cat([index_TK, torch.tensor([[E, E + 1]]).expand(T, 2)], 1),
        )
    if twin.module != "zaya":  # where expert 0 of weight 0 stands for nobody
        assert torch.equal(routing.index_TK.sort(1).values, index_TK.sort(1).values)
    torch.testing.assert_close(
        dense(routing.weight_TK, routing.index_TK), dense(weight_TK, index_TK), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("twin", INSTALLED, ids=[twin.kind for twin in INSTALLED])
def test_the_table_names_the_twin(twin: Twin) -> None:
    assert twin.kind in find(twin.name).same_as


def test_a_bias_that_is_forgotten_is_seen() -> None:
    """The comparison can fail: a planted error."""
    twin = next(twin for twin in TWINS if twin.name == "deepseek-v3")
    theirs = twin.theirs()
    ours, hidden_TD = twin.ours(theirs), torch.randn(T, D)
    ours.bias.zero_()
    _weight_TK, index_TK = chosen(theirs(hidden_TD))
    assert not torch.equal(ours(hidden_TD).index_TK.sort(1).values, index_TK.sort(1).values)


@pytest.mark.parametrize("shared", [False, True])
def test_gshard_is_the_router_of_nllb(shared: bool) -> None:
    """Whose layer goes wrong in transformers 5.23, and whose router does not; 40 tokens, room for 2 * 40 / 8 each."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    config = SimpleNamespace(
        num_experts=8, expert_capacity=10, hidden_size=D, router_bias=False, router_dtype="float32"
    )
    config.router_ignore_padding_tokens, config.second_expert_policy = False, "all"
    config.normalize_router_prob_before_dropping, config.batch_prioritized_routing = not shared, False
    config.moe_eval_capacity_token_fraction = -1.0
    torch.manual_seed(1)
    theirs = NllbMoeTop2Router(config).eval()
    kind = find("gshard").load()
    ours = kind(D, 8, kind.Options(shared=shared))
    ours.load_state_dict({"weight": theirs.classifier.weight})
    hidden_TD = torch.randn(T, D)
    _first, weight_TE, _logits = theirs(hidden_TD)
    routing = ours(hidden_TD)
    assert routing.dropped_TK.any()
    torch.testing.assert_close(dense(routing.weight_TK, routing.index_TK)[:, :8], weight_TE, atol=1e-6, rtol=1e-6)


@needs("switch_transformers")
@pytest.mark.parametrize("room", [1, 3, 100])
def test_switch_drops_what_switch_transformers_drops(room: int) -> None:
    """Its room is a number of places per expert and sequence, whatever the length."""
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SimpleNamespace(num_experts=E, expert_capacity=room, hidden_size=D, router_bias=False)
    config.router_jitter_noise, config.router_ignore_padding_tokens, config.router_dtype = 0.01, False, "float32"
    torch.manual_seed(1)
    theirs = SwitchTransformersTop1Router(config).eval()
    kind = find("switch").load()
    ours = kind(D, E, kind.Options(sequence_room=room))
    ours.load_state_dict({"weight": theirs.classifier.weight})
    hidden_NTD = torch.randn(3, T, D)
    mask_NTE, probability_NT1, _logits = theirs(hidden_NTD)
    routing = ours(hidden_NTD.view(-1, D), Context(sequence_T=torch.arange(3).repeat_interleave(T)))
    index_T = torch.where(mask_NTE.any(-1), mask_NTE.argmax(-1), NO_EXPERT).flatten()
    assert torch.equal(routing.index_TK[:, 0], index_T)
    expected_T = probability_NT1.flatten() * (index_T != NO_EXPERT)
    torch.testing.assert_close(routing.weight_TK[:, 0], expected_T, atol=1e-6, rtol=1e-6)
    assert bool(routing.dropped_TK.any()) == (room < 100)
