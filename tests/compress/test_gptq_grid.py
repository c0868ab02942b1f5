"""Uniform grids of 2, 3 and 4 bits."""

import gptq_by_hand
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import DTYPES, any_problem, assert_error_is_told, assert_reads_as_dense, correlated, read_back

from moectl.compress.quantise.method import method
from moectl.errors import UsageError

BF16 = torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(
    any_problem(), st.sampled_from(DTYPES), st.sampled_from([2, 3, 4]), st.sampled_from([-1, 1, 7, 64]), st.booleans()
)
def test_what_is_stored_reads_as_what_gptq_assumed(problem, dtype, bits, group_size, symmetric):
    weight, moments = problem
    chosen = method(bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    piece = chosen.quantise(weight, moments, None)
    assert_reads_as_dense(chosen, piece, dtype)
    assert all(len(value) == len(weight) and torch.isfinite(value.float()).all() for value in piece.values())
    assert not chosen.dense(piece)[(weight == 0).all(2)].any()
    blob = read_back(chosen, piece)
    assert (blob.zeros is None) == symmetric
    stored = blob.packed.nbytes + blob.scales.nbytes + (0 if symmetric else blob.zeros.nbytes)
    assert piece["bits_G"].mean().item() == pytest.approx(8 * stored / weight.numel())


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_gptq_from_the_strongest_input_down(symmetric):
    """With its own scales, weights become what the column-by-column reference makes of them in the same order."""
    weight, moments = correlated(1, 4, 70)
    chosen = method(3, group_size=32, symmetric=symmetric, dtype=BF16)
    piece = chosen.quantise(weight, moments, None)
    order = torch.argsort(moments[0].diagonal(), descending=True, stable=True)
    scale, zero = (
        piece[key][0].float().repeat_interleave(32, 1)[:, order].numpy() for key in ("scales_GRS", "points_GRS")
    )

    def to_value(value, row, column):
        number = np.clip(np.round(value / scale[row, column] + zero[row, column]), 0, 7)
        return float(torch.tensor((number - zero[row, column]) * scale[row, column]).to(BF16))

    hessian = gptq_by_hand.damped(moments[0, order][:, order].numpy(), chosen.damping)
    expected, _ = gptq_by_hand.quantise(weight[0, :, order].numpy(), hessian, to_value)
    assert np.allclose(chosen.dense(piece)[0, :, order].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_that_is_told_is_that_of_what_is_read(bits):
    weight, moments = correlated(2, 16, 300)
    chosen = method(bits, dtype=BF16)
    piece = chosen.quantise(weight, moments, None)
    assert_error_is_told(chosen, weight, moments, piece, rtol=1e-3)
    with pytest.raises(AssertionError):  # scales that were not rounded before they were used
        assert_error_is_told(chosen, weight, moments, piece | {"scales_GRS": piece["scales_GRS"] * 1.02}, rtol=1e-3)


def test_no_inputs_are_as_good_as_a_hessian_of_zeros():
    weight, _ = correlated(2, 6, 150)
    chosen = method(4, dtype=BF16)
    without, cold = (chosen.quantise(weight, moments, None) for moments in (None, torch.zeros(2, 150, 150)))
    assert all(torch.equal(without[key], cold[key]) for key in without)
    step = without["scales_GRS"].float().repeat_interleave(128, 2)[..., :150]
    # A step at most: zero is a number of the grid, which moves both ends by up to half a step.
    assert ((weight - chosen.dense(without)).abs() <= 1.02 * step).all()


def plain_grid(weight_RN, bits, group):
    """Round to nearest between the least and the largest weight of a group, the textbook way."""
    rows = weight_RN.unflatten(1, (-1, group))
    low, high = rows.amin(2, keepdim=True).clamp(max=0), rows.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((rows / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_inputs_a_grid_is_the_textbook_one(bits):
    weight, _ = correlated(1, 64, 256)
    chosen = method(bits, dtype=torch.float32)
    textbook = plain_grid(weight[0], bits, 128)
    torch.testing.assert_close(chosen.dense(chosen.quantise(weight, None, None))[0], textbook, atol=1e-5, rtol=0)


def test_more_bits_and_smaller_groups_are_better_and_told():
    weight, moments = correlated(1, 16, 256)
    pieces = {
        key: method(key[0], group_size=key[1], dtype=BF16).quantise(weight, moments, None)
        for key in ((2, 128), (3, 128), (4, 128), (4, 32), (4, -1))
    }
    error = {key: piece["error_G"].item() for key, piece in pieces.items()}
    assert error[2, 128] > error[3, 128] > error[4, 128] > error[4, 32]
    assert error[4, -1] > error[4, 128]
    assert pieces[4, 128]["bits_G"].item() == pytest.approx(4 + (16 + 4) / 128)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_a_group_can_hold_fits_its_type(bits, symmetric):
    """Near the end of float16 half a step more is infinite, and GPTQ uses all numbers there are."""
    weight, moments = correlated(1, 16, 200)
    weight = (weight * 4e6).clamp(-65504, 65504).half().float()
    for seen in (None, moments):
        chosen = method(bits, symmetric=symmetric, dtype=torch.float16)
        piece = chosen.quantise(weight, seen, None)
        assert chosen.dense(piece).isfinite().all() and piece["error_G"].item() < 0.5


@pytest.mark.parametrize("asked", [{"group_size": 0}, {"group_size": -2}, {"damping": 0.0}, {"damping": -0.1}])
def test_what_is_impossible_is_refused(asked):
    with pytest.raises(UsageError):
        method(4, dtype=BF16, **asked)
