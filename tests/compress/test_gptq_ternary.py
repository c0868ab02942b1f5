"""Ternary rows: the paper's, at the rates of its rule, and ours, at the rate that is asked for."""

import re

import gptq_by_hand
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import DTYPES, any_problem, assert_error_is_told, assert_reads_as_dense, correlated, read_back

from moectl.codecs.tables import QMOE
from moectl.compress.quantise.method import method
from moectl.compress.quantise.rate import check_possible, least_bits
from moectl.errors import InputError, UsageError

BF16 = torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(any_problem(), st.sampled_from(DTYPES), st.sampled_from(["paper", "means", "target", "symmetric"]))
def test_what_is_stored_reads_as_what_gptq_assumed(problem, dtype, kind):
    weight, moments = problem
    target = None
    if kind == "target" and least_bits(weight.shape[2], "tunstall", dtype) < 1.5:
        target = 1.5
    chosen = method(target, compat=kind == "paper", symmetric=kind == "symmetric", dtype=dtype)
    piece = chosen.quantise(weight, moments, None)
    assert_reads_as_dense(chosen, piece, dtype)
    assert all(len(value) == len(weight) and torch.isfinite(value.float()).all() for value in piece.values())
    empty = (weight == 0).all(2)
    assert not piece["trits_GRN"][empty].any()


def test_the_papers_grid_is_the_papers():
    weight, moments = correlated(2, 6, 150)
    piece = method(None, compat=True, dtype=BF16).quantise(weight, moments, None)
    ends = torch.stack([weight.amin(2), weight.amax(2)], 2)
    assert torch.equal(piece["levels_GR2"], ends.to(BF16))
    nearest = method(None, compat=True, dtype=BF16).quantise(weight, None, None)
    expected = (weight > ends[..., 1:] / 2).to(torch.int8) - (weight < ends[..., :1] / 2).to(torch.int8)
    assert torch.equal(nearest["trits_GRN"], expected)


@pytest.mark.parametrize("bits", [None, 0.8])
def test_one_level_for_both_signs_is_the_best_one(bits):
    weight, moments = correlated(2, 16, 256)
    chosen = method(bits, symmetric=True, dtype=torch.float32, stretched=False)
    piece = chosen.quantise(weight, moments, None)
    low, high = piece["levels_GR2"].unbind(2)
    assert torch.equal(low, -high) and (high > 0).all()
    damped = (
        moments.double()
        + 0.1
        * torch.diag_embed(torch.ones(2, 256, dtype=torch.float64))
        * (moments.double().diagonal(dim1=1, dim2=2).mean(1)[:, None, None])
    )

    def lost(times: float) -> torch.Tensor:
        off = weight.double() - times * chosen.dense(piece).double()
        return torch.einsum("grn,gnm,grm->gr", off, damped, off)

    assert (lost(1.0) <= lost(1.01)).all() and (lost(1.0) <= lost(0.99)).all()
    free = method(bits, dtype=torch.float32, stretched=False).quantise(weight, moments, None)
    assert (free["error_G"] < 1.05 * piece["error_G"]).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [None, 0.8])
def test_outputs_keep_their_energy_and_not_with_the_levels_of_least_error(bits, symmetric):
    weight, moments = correlated(2, 16, 256)
    damped = moments.double()
    damped += 0.1 * damped.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(256, dtype=torch.float64)

    def energy(rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("grn,gnm,grm->gr", rows.double(), damped, rows.double())

    def kept(stretched: bool) -> torch.Tensor:
        chosen = method(bits, symmetric=symmetric, dtype=torch.float32, stretched=stretched)
        return energy(chosen.dense(chosen.quantise(weight, moments, None))) / energy(weight)

    assert torch.allclose(kept(True), torch.ones(2, 16, dtype=torch.float64), rtol=5e-3)
    assert (kept(False) < 0.97).all()


def test_no_inputs_are_as_good_as_a_hessian_of_zeros():
    weight, _ = correlated(2, 6, 150)
    chosen = method(None, dtype=BF16)
    without, cold = (chosen.quantise(weight, moments, None) for moments in (None, torch.zeros(2, 150, 150)))
    assert all(torch.equal(without[key], cold[key]) for key in without)
    lost = (weight - chosen.dense(cold)).double().square().sum((1, 2)) / weight.double().square().sum((1, 2))
    assert torch.allclose(cold["error_G"].double(), lost, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [None, 0.8])
def test_the_error_that_is_told_is_that_of_what_is_read(bits, symmetric):
    weight, moments = correlated(2, 32, 384)
    chosen = method(bits, symmetric=symmetric, dtype=BF16)
    piece = chosen.quantise(weight, moments, None)
    assert_error_is_told(chosen, weight, moments, piece)
    with pytest.raises(AssertionError):
        assert_error_is_told(chosen, weight, moments, piece | {"levels_GR2": piece["levels_GR2"] * 1.05})


def test_it_is_gptq_with_levels_as_they_are_stored():
    weight, moments = correlated(1, 4, 90)
    chosen = method(None, compat=True, dtype=BF16)
    dense = chosen.dense(chosen.quantise(weight, moments, None))[0].numpy()
    ends = np.stack([weight[0].amin(1), weight[0].amax(1)], 1).astype(np.float64)

    def by_hand(levels):
        def to_value(value, row, column):
            low, high = ends[row] / 2
            return levels[row, 1] if value > high else levels[row, 0] if value < low else 0.0

        return gptq_by_hand.quantise(weight[0].numpy(), gptq_by_hand.damped(moments[0].numpy(), 0.1), to_value)

    stored, where = by_hand(torch.tensor(ends).to(BF16).double().numpy())
    assert np.allclose(dense, stored, atol=1e-7)
    assert np.abs(by_hand(ends)[1] - where).max() > 1e-5  # levels that are rounded only when they are stored


def test_levels_are_those_of_least_squares():
    weight, moments = correlated(1, 4, 200)
    chosen = method(None, dtype=torch.float32, stretched=False)
    piece = chosen.quantise(weight, moments, None)
    damped = (moments[0] + 0.1 * moments[0].diagonal().mean() * torch.eye(200)).double().numpy()
    for row in range(4):
        trits = piece["trits_GRN"][0, row].numpy()
        columns = np.stack([trits < 0, trits > 0], 1).astype(float)
        root = np.linalg.cholesky(damped).T
        best = np.linalg.lstsq(root @ columns, root @ weight[0, row].double().numpy(), rcond=None)[0]
        assert np.allclose(piece["levels_GR2"][0, row].numpy(), best, rtol=1e-3)


def test_without_a_number_outliers_do_not_decide_it():
    """0.9 bits for the code, and what rows take; by the paper's thresholds heavy tails would leave half of that."""
    weight, moments = correlated(2, 96, 512)
    weight[1] /= torch.tensor(np.random.default_rng(0).chisquare(4, (96, 512)) / 4).sqrt()
    pieces = [method(None, compat=compat, dtype=BF16).quantise(weight, moments, None) for compat in (False, True)]
    assert torch.allclose(pieces[0]["bits_G"], torch.tensor(0.9 + 48 / 512), rtol=0.02)
    assert pieces[1]["bits_G"][1] < 0.6
    assert pieces[0]["error_G"][1] < 0.7 * pieces[1]["error_G"][1]


@pytest.mark.parametrize("code", ["tunstall", "qmoe"])
@pytest.mark.parametrize("target", [0.9, 1.1])
def test_the_bits_that_are_asked_for_are_met(target, code):
    weight, moments = correlated(2, 96, 512)
    weight[1] /= torch.tensor(np.random.default_rng(0).chisquare(5, (96, 512)) / 5).sqrt()
    chosen = method(target, code=code, dtype=BF16)
    piece = chosen.quantise(weight, moments, None)
    assert torch.allclose(piece["bits_G"], torch.tensor(target), rtol=0.02)
    tensors = chosen.store("m", piece, transposed=False, stacked=True)
    on_disk = sum(8 * tensor.nbytes for tensor in tensors.values())
    assert on_disk / weight.numel() == pytest.approx(target, rel=0.02)
    assert (tensors["m.about"][1] == QMOE) == (code == "qmoe")


@pytest.mark.parametrize("strong", [0, 1000])
def test_ours_is_better_than_the_papers_at_equal_bits(strong):
    """Also where a few directions have nearly all the energy of inputs, as in trained models."""
    weight, moments = correlated(1, 96, 512)
    few = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    moments = moments / moments.diagonal(dim1=1, dim2=2).mean() + strong * few @ few.T / 8
    paper = method(None, compat=True, dtype=BF16).quantise(weight, moments, None)
    ours = method(paper["bits_G"].item(), dtype=BF16).quantise(weight, moments, None)
    assert ours["bits_G"] < 1.01 * paper["bits_G"]
    assert ours["error_G"] < 0.93 * paper["error_G"]


def test_what_bits_cannot_do_is_said():
    weight, moments = correlated(1, 4, 64)
    with pytest.raises(InputError, match=r"rows of 64 weights cannot have 0\.8 bits") as caught:
        method(0.8, dtype=BF16).quantise(weight, moments, None)
    assert "1.25 bits or more" in caught.value.fix
    method(1.25, dtype=BF16).quantise(weight, moments, None)
    for impossible in (5, 2.5, 0, -1):
        with pytest.raises(UsageError):
            method(impossible, dtype=BF16)
    for bits in (0.8, 4):
        with pytest.raises(UsageError):
            method(bits, compat=True, dtype=BF16)


@pytest.mark.parametrize("width", [32, 70, 333, 2048, 6144])
@pytest.mark.parametrize("code", ["tunstall", "qmoe"])
def test_the_advice_about_bits_can_be_followed(width, code):
    with pytest.raises(InputError) as caught:
        check_possible(0.01, width, code, BF16)
    advised = re.search(r"([\d.]+) bits or more", caught.value.fix)
    assert (advised is None) == (width == 32)
    if advised:
        check_possible(float(advised[1]), width, code, BF16)


def test_narrow_rows_may_take_more_than_three_values_need():
    """What a row takes besides its codes is counted too."""
    weight, moments = correlated(1, 96, 128)
    assert method(1.8, dtype=BF16).quantise(weight, moments, None)["bits_G"].item() == pytest.approx(1.8, rel=0.02)


def test_a_step_that_leads_away_from_the_bits_is_not_taken():
    """Rows of very different sizes: the few that the price is found with are not like all."""
    weight, moments = correlated(2, 200, 512, seed=512)
    piece = method(0.9, dtype=BF16).quantise(weight * torch.logspace(-3, 1, 200)[:, None], moments, None)
    assert torch.allclose(piece["bits_G"], torch.tensor(0.9), rtol=0.02)


def test_a_parameter_that_is_no_stack_and_one_that_is_transposed():
    weight, moments = correlated(1, 5, 70)
    chosen = method(None, dtype=BF16)
    piece = chosen.quantise(weight, moments, None)
    flat = chosen.store("m", piece, transposed=True, stacked=False)
    assert flat["m.counts"].shape == (5,) and flat["m.about"].tolist()[2:] == [70, 1]
    assert read_back(chosen, piece, transposed=True).transposed and not read_back(chosen, piece).transposed
    assert read_back(chosen, piece).shape == (1, 5, 70)


@pytest.mark.parametrize(("decay", "paper", "means"), [(0.5, 0.568, 0.448), (1.0, 0.263, 0.213)])
def test_the_papers_error_and_that_with_means_are_as_known(decay, paper, means):
    """Normal weights and inputs of `gptq_by_hand.inputs`; `benchmarks/gptq_table.py` has more of the table."""
    random = torch.Generator().manual_seed(0)
    matrices, width = 4, 1024
    turn = torch.linalg.qr(torch.randn(matrices, width, width, generator=random))[0]
    inputs = torch.randn(matrices, 4 * width, width, generator=random) * torch.arange(1, width + 1) ** (-decay / 2)
    moments = turn @ (inputs.mT @ inputs) @ turn.mT
    weight = torch.randn(matrices, 24, width, generator=random)
    for compat, known in ((True, paper), (False, means)):
        piece = method(None, compat=compat, means=not compat, dtype=BF16, stretched=False).quantise(
            weight, moments, None
        )
        assert piece["error_G"].mean().item() == pytest.approx(known, rel=0.05)
