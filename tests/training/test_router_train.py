"""`moectl train --router`: what is trained, what is saved as what, and that an interruption changes no bit of it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_routed as routed
import tiny_training as models
import torch
from installed import needs
from tiny_routed import trained
from tiny_training import ONE
from torch.nn.functional import kl_div, nll_loss, normalize
from transformers import AutoModelForCausalLM

from moectl.checkpoint.source import Checkpoint
from moectl.errors import InputError, UsageError
from moectl.evaluation.generation import Settings, generate
from moectl.families.releases import RECORDS
from moectl.integrations.routed.held import HeldRouter
from moectl.integrations.routed.install import held
from moectl.integrations.transformers import load
from moectl.layerwise.routed import plan_of, routed_plan
from moectl.training.checks import check
from moectl.training.metrics import read_metrics
from moectl.training.model import load_model
from moectl.training.preview import preview
from moectl.training.routing import RoutedWatch, routed_blocks, routed_source
from moectl.training.run import Reporting, train
from moectl.training.step import Step

NAMED = [  # those of the comparison in benchmarks/routers.py, but for soft-moe, which needs an encoder
    "noisy-top-k",
    "switch",
    "expert-choice",
    "s-base",
    "x-moe",
    "deepseek-v3",
    "evo-moe",
    "stable-moe:first_stage=0.5",
    "grin",
    "peer:heads=2,top_k=4",
    "mod",
    "base",
    "hash",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return models.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_moe(tmp_path_factory.mktemp("moe") / "moe", "mixtral", hidden_size=32, intermediate_size=48)


def ids(count: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (2, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("router", NAMED)
def test_each_router_trains_and_what_is_saved_is_what_was_trained(
    router: str, moe: Path, data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    from moectl.training import run

    monkeypatch.setattr(run, "whole_model", lambda model: kept.append(model) or whole(model))
    out = trained(moe, tmp_path / "out", data, router)
    model = kept[0].eval()
    passing = next(iter(held(model).values())).passing
    assert passing.progress == pytest.approx(2 / 3), "of the last of three steps"
    passing.progress = 1.0
    again = load(out).eval()
    with torch.no_grad():
        one, two = (each(ids(), use_cache=False).logits for each in (model, again))
    assert one.isfinite().all()
    # A family's own router may round otherwise than ours does: what is equal to 1e-6 is saved as an ordinary model.
    torch.testing.assert_close(one, two, rtol=0, atol=0 if held(again) else 1e-5)
    steps = read_metrics(out / "train" / "metrics.jsonl")
    assert all(step["aux"] is not None and step["load_cv"] for step in steps)
    moved = {name for name, value in again.state_dict().items() if "router" in name and value.is_floating_point()}
    assert moved or router in ("hash", "noisy-top-k")


def whole(model: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_what_the_family_does_itself_stays_an_ordinary_checkpoint(
    moe: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    """Mixtral's own router, and one that differs from it in training alone; and one more expert is another function."""
    for router in ("mixtral", "noisy-top-k"):
        out = trained(moe, tmp_path / router, data, router)
        assert routed.config(out)["model_type"] == "mixtral"
        assert models.tensors(out).keys() == models.tensors(moe).keys()
        _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    out = trained(moe, tmp_path / "three", data, "mixtral:k=3")
    assert routed.config(out)["router"]["options"]["top_k"] == 3


def test_what_the_family_has_no_place_for_is_never_lost(moe: Path, data: tuple[str, str], tmp_path: Path) -> None:
    """Prices that have hardly moved, so that they change no choice yet."""
    out = trained(moe, tmp_path / "out", data, "quantile:momentum=0.9999999")
    assert routed.config(out)["model_type"] == "moectl_routed"
    beta = models.tensors(out)["model.layers.1.block_sparse_moe.gate.router.beta"]
    assert 0 < beta.abs().max() < 1e-6


@needs("switch_transformers")
@pytest.mark.parametrize(("family", "ours"), [(300, 290), (290, 300)])
def test_rooms_of_different_sizes_are_told_apart(family: int, ours: int, data: tuple[str, str], tmp_path: Path) -> None:
    source = routed.save_switch(tmp_path / "moe", expert_capacity=family)
    out = trained(source, tmp_path / "same", data, f"switch:sequence_room={family}")
    assert routed.config(out)["model_type"] == "switch_transformers"
    out = trained(source, tmp_path / "other", data, f"switch:sequence_room={ours}")
    assert routed.config(out)["model_type"] == "moectl_routed"


@needs("deepseek_v3", since=RECORDS)
def test_selection_biases_move_and_return_to_the_family(data: tuple[str, str], tmp_path: Path) -> None:
    source = models.save_moe(tmp_path / "moe", "deepseek_v3", num_hidden_layers=3, norm_topk_prob=True)
    stated = routed.config(source)
    assert stated["n_group"] > stated["topk_group"]  # the router takes them, and the scale, from the model
    out = trained(source, tmp_path / "out", data, "deepseek-v3:bias_rate=0.01")
    assert routed.config(out)["model_type"] == "deepseek_v3"
    before, after = models.tensors(source), models.tensors(out)
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert biases and all((after[name] - before[name]).abs().max() == pytest.approx(0.03, rel=1e-4) for name in biases)


def test_an_interruption_changes_no_bit(moe: Path, data: tuple[str, str], tmp_path: Path) -> None:
    """Noise is drawn and cooled with the training, biases are moved by hand: all of it resumes."""
    for router in ("evo-moe", "loss-free:k=2"):
        recipe = models.recipe(data, steps=5, router=router, aux_loss=0.0, z_loss=0.0)
        straight = trained(moe, tmp_path / f"{router}-straight", data, router, steps=5)
        out = tmp_path / f"{router}-resumed"

        class Stopped(Exception):
            pass

        def stop(metrics: Any) -> None:
            if metrics.step == 3:
                raise Stopped

        with pytest.raises(Stopped):
            train(Checkpoint.open(moe), recipe, out, ONE, save_every=2, reporting=Reporting(on_step=stop))
        train(Checkpoint.open(moe), recipe, out, ONE)
        assert models.equal(straight, out), router


def test_a_trained_router_goes_on(moe: Path, data: tuple[str, str], tmp_path: Path) -> None:
    once = trained(moe, tmp_path / "once", data, "switch")
    twice = trained(once, tmp_path / "twice", data, None, z_loss=0.0)
    assert routed.config(twice)["router"] == routed.config(once)["router"]
    assert not models.equal(once, twice)
    with pytest.raises(UsageError, match="routed by switch already"):
        trained(once, tmp_path / "other", data, "mixtral")
    for name, fix in (("aux_loss", "--router switch:aux_loss=VALUE"), ("z_loss", "out."), ("bias_update", "out.")):
        with pytest.raises(UsageError, match="the model is routed by switch") as refused:
            trained(once, tmp_path / "other", data, None, **{"z_loss": 0.0, name: 0.1})
        assert fix in refused.value.fix
    with pytest.raises(UsageError, match="routed by switch already"):
        check(Checkpoint.open(once), models.recipe(data, router="mixtral", aux_loss=0.0, z_loss=0.0), 1)
    recipe = models.recipe(data, aux_loss=0.0, z_loss=0.0, only="router")
    assert preview(Checkpoint.open(once), recipe, tmp_path / "other", ONE).moe_layers == 2
    assert not list(tmp_path.glob("other*"))


def test_the_loss_of_a_router_is_what_trains_it(moe: Path, data: tuple[str, str], tmp_path: Path) -> None:
    """The gradient of a step is that of the language model's loss plus the routers' own, by one backward pass."""
    recipe = models.recipe(data, accumulate=1, router="switch:jitter=0", aux_loss=0.0, z_loss=0.0)
    source = routed_source(Checkpoint.open(moe), recipe, tmp_path, ONE)
    assert isinstance(source, Checkpoint)
    model = load_model(source)
    other = copy.deepcopy(model)
    watch = RoutedWatch(routed_blocks(model))
    batch = ids(32)
    found = Step(model, watch, recipe, ONE).gradients(batch, torch.ones_like(batch, dtype=torch.bool))

    loss = other(batch, labels=batch, use_cache=False).loss
    seen = [module.take() for module in held(other).values()]
    own = torch.stack([each.aux_loss for each in seen if each is not None]).sum()
    (loss + own).backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5) and found.aux == pytest.approx(own.item(), rel=1e-5)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert found.load is not None and found.load.sum(1).tolist() == [each.load_E.sum() for each in seen if each]


def test_two_draws_of_thor_are_held_together(moe: Path, data: tuple[str, str], tmp_path: Path) -> None:
    """CE of both passes and the mean of both divergences, of what is learnt alone, by PyTorch's own functions."""
    recipe = models.recipe(data, accumulate=1, router="thor:consistency=3", z_loss=0.0)
    source = routed_source(Checkpoint.open(moe), recipe, tmp_path, ONE)
    assert isinstance(source, Checkpoint)
    model = load_model(source)
    other = copy.deepcopy(model)
    batch, learnt = ids(32), torch.ones(2, 32, dtype=torch.bool)
    learnt[0, :20] = False
    torch.manual_seed(1)
    found = Step(model, RoutedWatch(routed_blocks(model)), recipe, ONE).gradients(batch, learnt)

    torch.manual_seed(1)
    p, q = (other(batch, use_cache=False).logits[:, :-1][learnt[:, 1:]].log_softmax(-1) for _ in range(2))
    one, two = (nll_loss(each, batch[:, 1:][learnt[:, 1:]]) for each in (p, q))
    apart = (
        kl_div(q, p, reduction="batchmean", log_target=True) + kl_div(p, q, reduction="batchmean", log_target=True)
    ) / 2
    assert apart > 1e-3, "two draws differ"
    (one + two + 3 * apart).backward()
    assert found.loss == pytest.approx(one.item(), rel=1e-5)
    assert found.aux == pytest.approx((two + 3 * apart).item(), rel=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_routers_see_the_tokens_of_their_sequences(moe: Path, tmp_path: Path) -> None:
    model = routed_model(moe, tmp_path, "hash")
    given = ids(7)
    seen: list[Any] = []
    for module in held(model).values():
        assert isinstance(module, HeldRouter)
        route = module.router.route
        module.router.route = lambda scores, context, _route=route: seen.append(context) or _route(scores, context)  # type: ignore[method-assign]
    model(given, use_cache=False)
    for context in seen:
        assert context.token_T.tolist() == given.flatten().tolist() and context.progress == 1
        assert context.sequence_T.tolist() == [0] * 7 + [1] * 7


def routed_model(source: Path, place: Path, router: str) -> Any:
    from moectl.checkpoint.writer import write

    write(routed_plan(plan_of(Checkpoint.open(source)), router), place / "routed")
    return load(place / "routed").eval()


def test_mixture_of_depths_is_the_layer_on_the_chosen_tokens_alone(moe: Path, tmp_path: Path) -> None:
    """Against the plain model's own layer, run on each sequence's chosen tokens at their positions."""
    model = routed_model(moe, tmp_path, "mod:decide=threshold,share=0.5")
    layer = held(model)["model.layers.1"]
    seen: list[Any] = []
    layer.register_forward_hook(lambda _m, given, named, out: seen.append((given[0], out)), with_kwargs=True)
    given = ids(12)
    with torch.no_grad():
        model(given, use_cache=False)
        x_BLD, y_BLD = seen[0]
        rotary = model.model.rotary_emb
        plain = type(layer).__bases__[1]
        for x_LD, y_LD in zip(x_BLD, y_BLD, strict=True):
            weight_L = x_LD @ layer.router.weight[0]
            through = weight_L.gt(0).nonzero()[:, 0]
            assert 0 < len(through) < len(x_LD)
            taken = x_LD[through][None]
            out = plain.forward(layer, taken, position_embeddings=rotary(taken, through[None]), attention_mask=None)
            expected = x_LD.clone()
            expected[through] += weight_L[through, None] * (out[0] - taken[0])
            torch.testing.assert_close(y_LD, expected, rtol=1e-4, atol=1e-5)
        longer = torch.cat([given[:, :8], (given[:, 8:] + 1) % 256], 1)
        one, two = (model(each, use_cache=False).logits[:, :8] for each in (given, longer))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg="in use no token knows of later ones")
    with pytest.raises(InputError, match="cache"):
        model(given, use_cache=True)
    told = generate(Checkpoint.open(tmp_path / "routed"), "1 + 1", Settings(max_new_tokens=2), lambda _text: None)
    assert told.new_tokens == 2


@needs("switch_transformers")
def test_soft_moe_is_slots_through_experts_in_the_encoder_alone(tmp_path: Path, data: tuple[str, str]) -> None:
    source = routed.save_switch(tmp_path / "moe")
    model = routed_model(source, tmp_path, "soft-moe:slots=2")
    (name,) = held(model)
    assert name.startswith("encoder.")
    block = model.get_submodule(name)
    x_BLD = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    block.passing.token_BL = torch.zeros(3, 10, dtype=torch.int64)
    key_DS, scale = block.router.key_DS, block.router.scale
    with torch.no_grad():
        y_BLD = block(x_BLD)
        for x_LD, y_LD in zip(x_BLD, y_BLD, strict=True):
            logits_LS = scale * normalize(x_LD, dim=1) @ normalize(key_DS, dim=0)
            slots_SD = logits_LS.softmax(0).T @ x_LD
            out_SD = torch.cat([block.experts[f"expert_{s // 2}"](slots_SD[s : s + 1]) for s in range(8)])
            torch.testing.assert_close(y_LD, logits_LS.softmax(1) @ out_SD, rtol=1e-4, atol=1e-5)
    out = trained(source, tmp_path / "out", data, "soft-moe:slots=2")
    assert routed.config(out)["router"]["name"] == "soft-moe" and load(out).config.is_encoder_decoder


@needs("switch_transformers")
def test_an_encoder_decoder_learns_to_fill_in_spans(tmp_path: Path, data: tuple[str, str]) -> None:
    source = routed.save_switch(tmp_path / "moe")
    out = trained(source, tmp_path / "out", data, None, steps=30, aux_loss=0.01, learning_rate=1e-2)
    steps = read_metrics(out / "train" / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] - 1 and len(steps[0]["load_cv"]) == 2
    assert routed.config(out)["model_type"] == "switch_transformers"
    with pytest.raises(UsageError, match="experts per token, and this model one"):
        trained(source, tmp_path / "two", data, "mixtral:k=2")
    models.byte_tokenizer().save_pretrained(source)
    with pytest.raises(InputError, match="extra_id_0"):
        trained(source, tmp_path / "no", data, None)


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ("soft-moe", "for encoders"),
        ("demix", "the task or the modality"),
        ("mot", "an architecture"),
        ("longcat", "more than the 8 experts"),
        ("mixtral:k=9", "cannot choose among 8"),
        ("switch,mixtral", "names 2 routers"),
        ("mone", "nested"),
    ],
)
def test_what_cannot_be_part_of_a_model_is_refused(
    router: str, said: str, moe: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        trained(moe, tmp_path / "out", data, router)
    assert said in f"{caught.value} {caught.value.why}" and not (tmp_path / "out.partial").exists()
    with pytest.raises(UsageError, match=re.escape(str(caught.value))):
        recipe = models.recipe(data, router=router, aux_loss=0.0, z_loss=0.0)
        preview(Checkpoint.open(moe), recipe, tmp_path / "out", ONE)


def test_losses_of_the_family_are_refused_beside_a_router(data: tuple[str, str]) -> None:
    recipe = models.recipe(data, router="switch", z_loss=0.0, aux_loss=0.0)
    recipe.check()
    with pytest.raises(UsageError, match="--aux-loss"):
        replace(recipe, aux_loss=0.01).check()
    replace(recipe, aux_loss=0.01, router="mod").check()  # whose MoE layers keep the family's


def test_two_processes_that_are_refused_say_so_once(data: tuple[str, str], tmp_path: Path) -> None:
    """A dense model has no routers to replace, which the first process finds out while the other one waits."""
    dense = models.save_dense(tmp_path / "dense")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "moectl", "train", str(dense), "--router", "switch", "--data", data[0]),
        *("--steps", "1", "--batch-size", "4", "--seq-len", "32", "--device", "cpu", "-o", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert re.findall(r"^error: (.*)", done.stderr, re.MULTILINE) == ["LlamaForCausalLM has no MoE layers."]
    assert set(re.findall(r"exitcode +: (-?[0-9]+)", done.stderr)) == {str(InputError.exit_code)}, done.stderr
    assert not list(tmp_path.glob("out*"))
