"""Research checkpoints: what they hold, who loads them and who refuses them, and how they are saved again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import installed
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moectl.checkpoint.source import Checkpoint
from moectl.checkpoint.writer import write
from moectl.cli.main import app
from moectl.data.tokens import BYTE_EOS_ID, byte_tokenizer
from moectl.errors import InputError, UsageError
from moectl.families.components import experts_and_top_k
from moectl.families.releases import RECORDS
from moectl.families.tiny import tiny_model
from moectl.families.tiny_moe import tiny_moe
from moectl.integrations.routed.held import HeldRouter
from moectl.integrations.routed.install import held, install, places
from moectl.integrations.transformers import load
from moectl.layerwise.routed import plan_of, routed_plan, router_of
from moectl.routers.registry import ROUTERS, find
from moectl.upcycle.recipe import SparseRecipe
from moectl.upcycle.sparse import plan_sparse

SIZES: dict[str, Any] = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": BYTE_EOS_ID, "num_hidden_layers": 2}
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "mixtral"
    tiny_moe("mixtral", **SIZES).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(mixtral: Path) -> Path:
    """With a router, an experts' implementation and a card."""
    return routed(mixtral, "switch:cf=2")


def routed(source: Path, router: str, seed: int = 0) -> Path:
    out = source.with_name(f"{source.name}-{router.replace(':', '-')}-{seed}")
    write(routed_plan(plan_of(Checkpoint.open(source)), router, seed), out)
    return out


def test_it_loads_completely_and_saves_itself_bit_for_bit(made: Path, tmp_path: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert torch.equal(model.eval()(IDS).logits, again.eval()(IDS).logits)
    again.save_pretrained(tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name
    one, two = load_file(made / "model.safetensors"), load_file(tmp_path / "once" / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "model.layers.0.block_sparse_moe.gate.router.weight" in one, "named on disk as the family names its own"


def test_its_config_says_what_it_is(made: Path, mixtral: Path) -> None:
    stated, base = (json.loads((path / "config.json").read_text()) for path in (made, mixtral))
    assert stated["model_type"] == "moectl_routed" and set(stated) == {"model_type", "base_config", "router"}
    assert stated["router"]["name"] == "switch" and stated["router"]["options"]["capacity_factor"] == 2
    assert (
        stated["base_config"]["model_type"] == "mixtral" and stated["base_config"]["hidden_size"] == base["hidden_size"]
    )
    config = AutoConfig.from_pretrained(made)
    assert config.hidden_size == base["hidden_size"] and config.model_type == "mixtral"
    assert AutoTokenizer.from_pretrained(made).encode("a b") == [97, 32, 98]
    card = (made / "README.md").read_text().splitlines()
    assert card[4].startswith("# Research checkpoint") and "transformers, vLLM and others refuse" in card[6]


def test_transformers_alone_refuses_it(made: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(made)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "moectl_routed" in done.stderr


def test_gates_of_one_shape_are_kept_and_all_else_is_drawn_by_the_seed(mixtral: Path) -> None:
    base = load_file(mixtral / "model.safetensors")
    one, other, again = (routed(mixtral, "x-moe", seed) for seed in (0, 1, 0))
    name = "model.layers.1.block_sparse_moe.gate.router.projection"
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert again == one and not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first[name.replace("layers.1", "layers.0")])
    kept = load_file(routed(mixtral, "switch") / "model.safetensors")
    gate = "model.layers.1.block_sparse_moe.gate"
    assert torch.equal(kept[f"{gate}.router.weight"], base[f"{gate}.weight"])
    shared = base.keys() & kept.keys()
    assert len(shared) == len(base) - 2 and all(torch.equal(base[name], kept[name]) for name in shared)


def test_a_dropped_token_goes_nowhere_under_every_implementation(mixtral: Path) -> None:
    """A layer's output is the sum over what its router kept, written out; a batch of one token overflows any room."""
    model = load(routed(mixtral, "switch:cf=1")).eval()
    block = model.model.layers[0].mlp
    x_BLD = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(1, 16, -1).contiguous()
    with torch.no_grad():
        found = block.gate.router.route(block.gate.router.score(x_BLD[0], _context(x_BLD[0])), _context(x_BLD[0]))
        assert found.dropped_TK.sum() == 14, "room for 2 of 16"
        expert = found.index_TK[0, 0]
        gate, up = (block.experts.gate_up_proj[expert] @ x_BLD[0, 0]).chunk(2)
        one_D = found.weight_TK[0, 0] * (block.experts.down_proj[expert] @ (block.experts.act_fn(gate) * up))
        for implementation in ("eager", "batched_mm", "grouped_mm", "moectl"):
            model.set_experts_implementation(implementation)
            y_LD = block(x_BLD)[0]
            torch.testing.assert_close(y_LD[:2], one_D.expand(2, -1), rtol=1e-4, atol=1e-6, msg=implementation)
            assert not y_LD[2:].any(), implementation


def _context(hidden_TD: torch.Tensor) -> Any:
    from moectl.routers.protocol import Context

    return Context(hidden_TD=hidden_TD)


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3_moe", "olmoe", "gpt_oss", "ernie4_5_moe"),
        *installed("deepseek_v3", since=RECORDS),
        *installed("granitemoe", since="5.21"),
    ],
)
def test_families_whose_router_can_be_replaced(family: str) -> None:
    """With the router that each has, in ours: the same logits, but for rounding."""
    rule = {"olmoe": "olmoe", "granitemoe": "gpt-oss", "gpt_oss": "gpt-oss", "qwen3_moe": "mixtral"}.get(family)
    model = tiny_moe(family, **SIZES | ({"norm_topk_prob": True} if family == "qwen3_moe" else {})).eval()
    before = model(IDS).logits
    gates = {place.name: dict(place.module.named_parameters()) for place in places(model)}
    names = {place.name for place in places(model)}
    install(model, router_of(rule or "switch", model.config))
    assert {name for name, module in held(model).items() if isinstance(module, HeldRouter)} == names
    for name, module in held(model).items():
        for leaf, parameter in module.router.named_parameters():
            if leaf in gates[name]:  # a bias that a family has not begins at 0
                parameter.data.copy_(gates[name][leaf].data)
    after = model.eval()(IDS).logits
    assert torch.allclose(before, after, atol=1e-5) == (rule is not None) and after.isfinite().all()


def test_families_that_do_it_their_own_way_are_refused() -> None:
    for family in ("jetmoe", "llama4_text"):
        with pytest.raises(InputError, match=r"cannot be replaced|no MoE layers"):
            install(tiny_moe(family), {"name": "switch", "options": {}})


def test_every_router_is_held_or_refused_in_words(mixtral: Path) -> None:
    config = AutoConfig.from_pretrained(mixtral)
    able = []
    for entry in ROUTERS:
        try:
            model = tiny_moe("mixtral", **SIZES)
            install(model, router_of(entry.name, config))
        except UsageError as error:
            assert error.fix, entry.name
            continue
        with torch.no_grad():
            assert model.eval()(IDS, use_cache=False).logits.isfinite().all(), entry.name
        able.append(entry.name)
    assert len(able) > 35 and {"peer", "mod", "base", "hash", "top-p", "thor"} <= set(able)


def test_a_dense_model_is_upcycled_with_a_router(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_model("llama", **SIZES).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    command = [
        "upcycle",
        "sparse",
        str(dense),
        "--experts",
        "4",
        "--router",
        "expert-choice",
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out")
    assert "not causal" in done.stderr and sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    plain = plan_sparse(Checkpoint.open(dense), SparseRecipe(experts=4))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found) == len(plain.tensors)
    model = load(tmp_path / "out")
    assert model.config.router["name"] == find("expert-choice").name and model.config.router["options"]["top_k"] == 2
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert {"experts": 4, "top_k": 2, "layers": 2}.items() <= found.items()
    for router, share in (("switch", 1), ("adaptive-mixtures", 4), ("top-p", None)):
        asked = [*command[:6], router, *command[7:], "--dry-run", "--json"]
        planned = json.loads(CliRunner().invoke(app, asked, catch_exceptions=False).stdout)
        idle = (2 - share) * (found["parameters"] - found["active_parameters"]) // 2 if share else 0
        active = found["active_parameters"] - idle
        assert planned["active_parameters"] == (None if share is None else active), router
    asked = [*command[:6], "top-p", *command[7:], "--overwrite"]
    assert "active" not in CliRunner().invoke(app, asked, catch_exceptions=False).stderr
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_what_a_token_takes_is_said_by_its_router(made: Path) -> None:
    """A Mixtral takes two experts, with Switch's router one; Mixture-of-Depths leaves the experts' own router."""
    found = CliRunner().invoke(app, ["inspect", str(made), "--json"]).stdout
    assert {"experts": 8, "top_k": 1}.items() <= json.loads(found).items()
    stated = json.loads((made / "config.json").read_text())
    stated["router"] = {"name": "mod", "options": {"top_k": 1}}
    assert experts_and_top_k(stated) == (8, 2)


def test_its_routing_is_analysed_without_those_that_went_nowhere(made: Path, tmp_path: Path) -> None:
    from moectl.routing.points import find as find_points

    taps = find_points(load(made))
    assert [tap.point.selects for tap in taps] == [False, False]
    index, weight = torch.tensor([[0], [3], [0]]), torch.tensor([[0.5], [0.25], [0.0]])
    assert taps[0].chosen(index, weight)[0].tolist() == [[0], [3], [-1]]


@pytest.mark.parametrize(
    "command",
    [["compress", "qmoe"], ["compress", "prune", "--keep", "2"], ["upcycle", "sparse"], ["upcycle", "pesc"]],
    ids=lambda command: "-".join(command[:2]),
)
def test_other_commands_refuse_it(command: list[str], made: Path, tmp_path: Path) -> None:
    from moectl.errors import MoectlError

    name, kind, *options = command
    with pytest.raises(MoectlError) as caught:
        CliRunner().invoke(app, [name, kind, str(made), *options, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert caught.value.exit_code in (2, 3) and not (tmp_path / "out").exists()
