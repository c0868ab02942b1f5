"""What is seen of products, whatever they are written as, and which rows of a choice become Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import Exact, Rounded, saved, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from moectl.checkpoint.source import Checkpoint
from moectl.compress.pipeline.moments import Moments, from_choices
from moectl.compress.pipeline.preflight import estimate, require
from moectl.compress.pipeline.report import reports
from moectl.compress.pipeline.run import run
from moectl.compress.pipeline.settings import Settings
from moectl.compress.pipeline.stacks import Stack, candidates, experts_modules
from moectl.compress.pipeline.watch import Product, Watch
from moectl.compress.quantise.method import method
from moectl.errors import InputError, MachineError, UsageError

E, R, N = 3, 4, 6
FORMS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Any]]] = {
    "linear": (False, lambda w_ERN, x_SN: functional.linear(x_SN, w_ERN[1])),
    "linear with a bias": (False, lambda w_ERN, x_SN: functional.linear(x_SN, w_ERN[1], torch.ones(R))),
    "linear of a batch": (False, lambda w_ERN, x_SN: functional.linear(x_SN[None, :, :], w_ERN[1])),
    "x @ w.T": (False, lambda w_ERN, x_SN: x_SN @ w_ERN[1].T),
    "x @ w": (True, lambda w_ENR, x_SN: x_SN @ w_ENR[1]),
    "addmm": (True, lambda w_ENR, x_SN: torch.addmm(torch.ones(R), x_SN, w_ENR[1])),
    "einsum": (True, lambda w_ENR, x_SN: torch.einsum("sn,nr->sr", x_SN, w_ENR[1])),
    "einsum, rows first": (False, lambda w_ERN, x_SN: torch.einsum("sn,rn->sr", x_SN, w_ERN[1])),
    "bmm of some": (True, lambda w_ENR, x_SN: torch.bmm(x_SN.expand(1, -1, -1), w_ENR[1:2])),
    "w @ x": (False, lambda w_ERN, x_SN: w_ERN[1] @ x_SN.T),
    "w @ vector": (False, lambda w_ERN, x_SN: w_ERN[1] @ x_SN[0]),
    "by a tensor's number": (False, lambda w_ERN, x_SN: functional.linear(x_SN, w_ERN[torch.tensor(1)])),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_number_and_orientation_of_every_form_of_product(form: str) -> None:
    transposed, compute = FORMS[form]
    weight, x_SN = torch.randn(E, *((N, R) if transposed else (R, N))), torch.randn(5, N)
    seen: list[Product] = []
    with Watch({"w": weight}, seen.append):
        compute(weight, x_SN)
        x_SN @ torch.randn(N, R)
    (product,) = seen
    assert (product.name, product.number, product.outputs, product.transposed) == ("w", 1, R, transposed)
    assert torch.equal(product.x_SN, x_SN[: len(product.x_SN)])


@pytest.mark.parametrize("form", FORMS)
def test_products_that_nobody_reads_are_seen_and_zero(form: str) -> None:
    transposed, compute = FORMS[form]
    weight, x_SN = torch.randn(E, *((N, R) if transposed else (R, N))), torch.randn(5, N)
    whole, seen = compute(weight, x_SN), []
    with Watch({"w": weight}, seen.append, {"w"}):
        unread, other = compute(weight, x_SN), x_SN @ torch.ones(N, R)
    assert len(seen) == 1 and unread.shape == whole.shape and other.all()
    assert not torch.equal(unread, whole) and (unread == unread.flatten()[0]).all()  # but for a bias of ones


class Choosing(nn.Module):
    """Experts of one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, R, N))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        for expert in top_k_index.unique():
            functional.linear(hidden_states[(top_k_index == expert).any(1)], self.up_proj[expert])


def moments_of(given: list[Any], cap: int = 100, experts: nn.Module | None = None, **how: bool) -> Moments:
    experts = experts or Choosing()
    stack = Stack(("up_proj",), E, R, N, False)
    moments = Moments.none([stack], 0, E, "cpu")
    ways = {"all_experts": False, "gate_weighted": False, **how}
    from_choices(moments, experts, {"up_proj": experts.up_proj}, given, cap, **ways)
    return moments


def choices(count: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    index = [torch.randn(20, E, generator=generator).topk(2).indices for _ in range(count)]
    return [(torch.randn(20, N, generator=generator), each, torch.rand(20, 2, generator=generator)) for each in index]


def by_hand(given: list[Any], expert: int, cap: int | None, weigh: bool, everyone: bool) -> tuple[Tensor, int]:
    rows = [
        x_TD[token].double() * (float(weight_TK[token][index_TK[token] == expert].sum()) ** 0.5 if weigh else 1)
        for x_TD, index_TK, weight_TK in given
        for token in range(len(x_TD))
        if everyone or (weight_TK[token][index_TK[token] == expert] != 0).any()
    ][:cap]
    return sum((torch.outer(row, row) for row in rows), torch.zeros(N, N).double()), len(rows)


@pytest.mark.parametrize(
    ("cap", "how"),
    [(100, {}), (7, {}), (100, {"gate_weighted": True}), (25, {"all_experts": True}), (9, {"gate_weighted": True})],
)
def test_hessians_are_of_the_first_rows_that_were_routed(cap: int, how: dict[str, bool]) -> None:
    given = choices()
    given[0][2][3] = 0  # nobody looks at what these experts make of it
    moments = moments_of(given, cap, **how)
    for expert in range(E):
        wanted, count = by_hand(given, expert, cap, how.get("gate_weighted", False), how.get("all_experts", False))
        assert moments.counts[0][expert] == count
        torch.testing.assert_close(moments.hessians[0][expert].double(), wanted, rtol=1e-5, atol=1e-5)


def test_experts_whose_products_are_not_all_seen_are_refused() -> None:
    class Copying(Choosing):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
            for expert in top_k_index.unique():
                hidden_states @ (self.up_proj[expert] * 1).T

    with pytest.raises(InputError, match="Not all that Copying multiplies its matrices with can be seen"):
        moments_of(choices(), experts=Copying())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", num_hidden_layers=2)[0]


SETTINGS = Settings(batch_experts=3, min_tokens=1, micro_batch=2)


def test_cold_experts_are_rounded_to_nearest_and_said_to_be_cold(mixtral: Checkpoint, tmp_path: Path) -> None:
    exact = Exact()
    (first, *_) = reports(run(mixtral, token_ids(), exact, replace(SETTINGS, min_tokens=25), tmp_path))
    cold = [each for each in first.matrices if each.cold]
    assert {each.cold for each in first.matrices} == {True, False}
    assert all((each.looked_at < 25) == each.cold for each in first.matrices)
    assert {each.expert for each in cold} == {each.expert for each in cold if "down" in each.parameter}
    for _, hessian_GNN, counted_G in exact.given:
        if hessian_GNN is None:
            assert (counted_G < 25).all()
        else:
            assert torch.equal(hessian_GNN.flatten(1).any(1), counted_G >= 25)


def test_no_expert_is_looked_at_for_more_than_a_multiple_of_the_mean(mixtral: Checkpoint, tmp_path: Path) -> None:
    found = reports(run(mixtral, token_ids(), Exact(), replace(SETTINGS, cap=0.5), tmp_path))[0].matrices
    assert sum(each.tokens for each in found) == 2 * 2 * 4 * 24
    assert all(each.looked_at == min(each.tokens, 12) for each in found)


def test_later_layers_are_given_what_the_stored_ones_make(mixtral: Checkpoint, tmp_path: Path) -> None:
    """The second layer's Hessians are those of a model whose first layer has the stored weights."""
    exact, rounded = Exact(), Rounded()
    files = run(mixtral, token_ids(), rounded, SETTINGS, tmp_path / "one")
    changed = {}
    for name, value in load_file(mixtral.path / "model.safetensors").items():
        layer, _, rest = name.partition(".block_sparse_moe.experts.")
        if rest and ".layers.0." in name:
            expert, which, _ = rest.split(".")
            stored = load_file(files[0])
            part = "down_proj" if which == "w2" else "gate_up_proj"
            matrix = stored[f"{layer}.mlp.experts.{part}.plain"][int(expert)]
            half = len(matrix) // 2
            value = matrix if which == "w2" else matrix[:half] if which == "w1" else matrix[half:]
        changed[name] = value.contiguous()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((mixtral.path / "config.json").read_text())
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    run(Checkpoint.open(other), token_ids(), exact, SETTINGS, tmp_path / "two")
    again = Exact()

    class Second(Rounded):
        def quantise(self, *given: Any) -> dict[str, Tensor]:
            again.quantise(*given)
            return super().quantise(*given)

    run(mixtral, token_ids(), Second(), SETTINGS, tmp_path / "three")
    half = len(exact.given) // 2
    for (_, hessian, _), (_, wanted, _) in zip(again.given[half:], exact.given[half:], strict=True):
        assert hessian is not None
        assert wanted is not None
        assert torch.equal(hessian, wanted)
    assert not torch.equal(again.given[half][1], run_first(mixtral, tmp_path)[half][1])  # type: ignore[arg-type]


def run_first(source: Checkpoint, tmp_path: Path) -> list[Any]:
    exact = Exact()
    run(source, token_ids(), exact, SETTINGS, tmp_path / "plain")
    return exact.given


def test_what_only_runs_as_a_whole_cannot_be_calibrated_on_all_tokens(tmp_path: Path) -> None:
    source, _ = saved(tmp_path / "model", "jetmoe")
    for wish in ({"all_experts": True}, {"gate_weighted": True}):
        with pytest.raises(UsageError, match="calibrated neither on all tokens nor by gates"):
            run(source, token_ids(), Exact(), replace(SETTINGS, **wish), tmp_path / "work")


def test_shared_experts_and_routers_are_nobodys_experts(tmp_path: Path) -> None:
    _, model = saved(tmp_path / "model", "qwen2_moe")
    layer = model.model.layers[0]
    assert list(experts_modules(layer)) == ["mlp.experts"]
    assert set(candidates("x", layer)) == {"x.mlp.experts.gate_up_proj", "x.mlp.experts.down_proj"}


def test_an_estimate_is_of_the_right_size_and_too_little_room_is_refused(
    mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = method(4, group_size=32, dtype=torch.float32)
    files = run(mixtral, token_ids(), how, SETTINGS, tmp_path)
    found = estimate(mixtral, token_ids(), how, SETTINGS)
    stored = sum(value.nbytes for file in files for value in load_file(file).values())
    assert found.experts == sum(each.rows * each.columns for report in reports(files) for each in report.matrices)
    assert 0.9 < found.output / stored < 1.1
    assert 0.9 < found.bits / (8 * stored / found.experts) < 1.1
    assert found.seconds > 0
    require(found, SETTINGS, tmp_path / "new")
    from moectl.compress.pipeline import preflight

    monkeypatch.setattr(preflight, "free_bytes", lambda folder: found.scratch)
    with pytest.raises(MachineError, match="of disk in"):
        require(found, SETTINGS, tmp_path / "new")
    require(found, SETTINGS, files[0].parent)
    with pytest.raises(MachineError, match="of memory"):
        require(replace(found, memory=1 << 60), SETTINGS, tmp_path / "new")
