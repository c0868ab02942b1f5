"""Batched GPTQ against the column-by-column one of `gptq_by_hand`, and with Hessians that are hard to factor."""

from dataclasses import replace

import gptq_by_hand
import numpy as np
import pytest
import torch

from moectl.compress.quantise import grid, ternary
from moectl.compress.quantise.gptq import factor, identity, sweep
from moectl.compress.quantise.method import method
from moectl.errors import InputError

STEP = 0.25
DAMPING = 0.1


def problem(matrices, rows, width, seed=0, decay=0.7):
    """Weights of about 1, and second moments of correlated inputs whose columns differ in size."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(0.5 * rng.standard_normal((matrices, width)))
    plain = np.stack([gptq_by_hand.hessian(3 * width, width, decay, seed + index) for index in range(matrices)])
    weight = torch.tensor(rng.standard_normal((matrices, rows, width)))
    return weight, torch.tensor(plain * sizes[:, :, None] * sizes[:, None])


def swept(weight_GRN, factored):
    """What a sweep to multiples of a step gives, and where each weight was when it was rounded, both [G, R, N]."""
    rounded, off = sweep(weight_GRN.mT.contiguous(), factored, lambda target, _: (target / STEP).round() * STEP)
    return rounded.mT, (rounded + off).mT


def by_hand(weight_GRN, hessian_GNN, damping=DAMPING):
    """The same from the reference."""
    results = [
        gptq_by_hand.quantise(w, gptq_by_hand.damped(h, damping), lambda x, *_: np.round(x / STEP) * STEP)
        for w, h in zip(weight_GRN.numpy(), hessian_GNN.numpy(), strict=True)
    ]
    return tuple(torch.tensor(np.stack(parts)) for parts in zip(*results, strict=True))


def largest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(("matrices", "rows", "width"), [(2, 3, 200), (3, 2, 129), (1, 4, 1), (2, 1, 2), (1, 2, 96)])
def test_it_equals_gptq_column_by_column(matrices, rows, width):
    weight, hessian = problem(matrices, rows, width)
    rounded, target = swept(weight, factor(hessian, DAMPING))
    expected, expected_target = by_hand(weight, hessian)
    assert largest(target, expected_target) < 1e-6
    assert largest(rounded, expected) < 1e-6


def test_in_float32_only_ties_differ():
    weight, hessian = problem(2, 16, 128)
    exact, target = swept(weight, factor(hessian, DAMPING))
    single, single_target = swept(weight.float(), factor(hessian.float(), DAMPING))
    same_rows = (exact == single).all(2)
    assert same_rows.float().mean() > 0.9
    assert largest(target[same_rows], single_target[same_rows]) < 1e-4


PLANTED = {
    "the factor transposed": lambda f, h: replace(f, feedback_GNN=f.feedback_GNN.mT.contiguous()),
    "nothing passed on to the second block": lambda f, h: replace(f, feedback_GNN=cut(f.feedback_GNN)),
    "ten times the damping": lambda f, h: factor(h, 10 * DAMPING),
    "no Hessian": lambda f, h: identity(h),
}


def cut(feedback):
    feedback = feedback.clone()
    feedback[:, :128, 128:] = 0
    return feedback


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_seen(planted):
    weight, hessian = problem(1, 2, 160)
    _, target = swept(weight, PLANTED[planted](factor(hessian, DAMPING), hessian))
    assert largest(target, by_hand(weight, hessian)[1]) > 1e-3


def test_the_factor_is_one_of_the_damped_hessian():
    _, hessian = problem(3, 1, 70)
    factored = factor(hessian, DAMPING)
    unit = factored.feedback_GNN + torch.eye(70, dtype=torch.float64)
    again = unit * factored.pivot_GN[:, None] @ unit.mT
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert largest(again, hessian / mean + DAMPING * torch.eye(70, dtype=torch.float64)) < 1e-12
    assert torch.equal(factored.feedback_GNN, factored.feedback_GNN.triu(1))


def test_the_scale_of_a_hessian_does_not_matter():
    weight, hessian = problem(1, 4, 60)
    rounded = [swept(weight.float(), factor((hessian * scale).float(), DAMPING))[0] for scale in (1, 2**-40, 2**40)]
    assert torch.equal(rounded[0], rounded[1]) and torch.equal(rounded[0], rounded[2])


def test_an_input_that_was_never_there_is_rounded_to_nearest():
    weight, hessian = problem(1, 5, 40)
    hessian[:, 7], hessian[:, :, 7] = 0, 0
    rounded, target = swept(weight, factor(hessian, DAMPING))
    assert torch.equal(target[..., 7], weight[..., 7])
    assert largest(rounded, by_hand(weight, hessian)[0]) < 1e-6


def test_nothing_but_zeros_is_rounded_to_nearest_and_the_others_are_not():
    weight, hessian = problem(3, 4, 50)
    hessian[1] = 0
    rounded, target = swept(weight, factor(hessian, DAMPING))
    assert torch.equal(target[1], weight[1])
    alone = swept(weight[2:], factor(hessian[2:], DAMPING))[0]
    assert torch.equal(rounded[2:], alone)
    assert torch.equal(swept(weight, identity(weight))[0][1], rounded[1])


def test_a_hessian_that_cannot_be_factored_is_damped_more_then_left_out_and_told():
    weight, hessian = problem(3, 4, 30)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    scale = hessian.diagonal(dim1=1, dim2=2).mean(1)
    for index, least in ((1, -0.5), (2, -1000.0)):
        spoiled = eigenvalues[index].clone()
        spoiled[0] = least * scale[index]
        spoiled[-1] += -least * scale[index]
        hessian[index] = vectors[index] * spoiled @ vectors[index].T
    factored = factor(hessian, DAMPING)
    assert factored.fallback_G.tolist() == [False, True, True]
    assert factored.damping_G.tolist() == [DAMPING, pytest.approx(1.0), 0]
    assert torch.equal(factored.feedback_GNN[2], torch.zeros(30, 30, dtype=torch.float64))
    assert torch.equal(factored.feedback_GNN[:1], factor(hessian[:1], DAMPING).feedback_GNN)
    piece = method(None, dtype=torch.bfloat16).quantise(weight.float(), hessian.float(), None)
    assert piece["fallback_G"].tolist() == [False, True, True]


@pytest.mark.parametrize("bits", [None, 0.9, 2, 4])
def test_matrices_do_not_know_of_one_another(bits):
    weight, hessian = (part.float() for part in problem(3, 16, 192))
    chosen = method(bits, dtype=torch.bfloat16)
    together = chosen.quantise(weight, hessian, None)
    alone = [chosen.quantise(weight[i : i + 1], hessian[i : i + 1], None) for i in range(3)]
    for key, value in together.items():
        assert torch.allclose(value.float(), torch.cat([piece[key] for piece in alone]).float(), rtol=1e-5), key
    assert all(torch.equal(value, chosen.quantise(weight, hessian, None)[key]) for key, value in together.items())


@pytest.mark.parametrize("bits", [None, 0.9, 3])
def test_rows_may_be_worked_on_in_parts(monkeypatch, bits):
    weight, hessian = (part.float() for part in problem(2, 40, 128))
    chosen = method(bits, dtype=torch.bfloat16)
    whole = chosen.quantise(weight, hessian, None)
    for module in (grid, ternary):
        monkeypatch.setattr(module, "ROWS", 16)
    parts = chosen.quantise(weight, hessian, None)
    for key in ("error_G", "bits_G", "zeros_G"):
        assert torch.allclose(parts[key], whole[key], rtol=1e-4), key
    # Last digits of sums depend on how many rows are summed at once, and can decide on a weight at a threshold.
    differ = (chosen.dense(parts) - chosen.dense(whole)).abs() > 1e-5
    assert differ.any(2).sum() <= 1


@pytest.mark.parametrize("bits", [None, 1.0, 4])
def test_weights_whose_squares_leave_float32_are_refused(bits):
    """They would all become zeros, with an error of 0."""
    weight = problem(3, 4, 200)[0].float()
    chosen = method(bits, dtype=torch.bfloat16)
    chosen.quantise(weight * 1e13, None, None)
    weight[2, 1, 3] = -1e16
    with pytest.raises(InputError, match=r"^Matrix 2 .* a weight of 1e\+16\.$"):
        chosen.quantise(weight, None, None)


def test_what_is_not_finite_is_named():
    weight, hessian = (part.float() for part in problem(3, 4, 20))
    chosen = method(4, dtype=torch.bfloat16)
    for tensor, what in ((weight, "a weight of matrix 2"), (hessian, "a second moment of the inputs of matrix 2")):
        for bad in (torch.nan, torch.inf):
            spoiled = tensor.clone()
            spoiled[2, 1, 3] = bad
            with pytest.raises(ValueError, match=f"^{what} is not finite$"):
                chosen.quantise(*((spoiled, hessian) if tensor is weight else (weight, spoiled)), None)
