"""Matrix product operators: exact when nothing is cut off, best possible when cut in two, shared in the middle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import arrays, gelu, routed, router, seeded

from moectl.routers.layers.mpoe import MpoExperts, factored, multiplied
from moectl.routers.protocol import Context

ROWS, COLUMNS = (2, 3, 2), (2, 2, 3)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_factors_multiply_to_the_matrix(sizes: list[tuple[int, int]]) -> None:
    rows, columns = zip(*sizes, strict=True)
    matrix = torch.randn(math.prod(rows), math.prod(columns), dtype=torch.float64)
    tensors = factored(matrix, rows, columns)
    torch.testing.assert_close(multiplied(tensors), matrix)
    assert [tensor.shape[1:3] for tensor in tensors] == [torch.Size(size) for size in sizes]


def test_an_element_is_a_product_of_small_matrices() -> None:
    """M[i1 i2 i3, j1 j2 j3] = T1[i1 j1] T2[i2 j2] T3[i3 j3]."""
    matrix = torch.randn(12, 12, dtype=torch.float64)
    one, two, three = (tensor.numpy() for tensor in factored(matrix, ROWS, COLUMNS))
    for i, j in np.ndindex(12, 12):
        (i1, i2, i3), (j1, j2, j3) = np.unravel_index(i, ROWS), np.unravel_index(j, COLUMNS)
        assert (one[:, i1, j1] @ two[:, i2, j2] @ three[:, i3, j3]).item() == pytest.approx(float(matrix[i, j]))


def test_a_bond_cuts_off_the_smallest_singular_values() -> None:
    matrix = torch.randn(6, 6, dtype=torch.float64)
    unfolded = matrix.view(2, 3, 3, 2).permute(0, 2, 1, 3).reshape(6, 6)  # rows (i1, j1), columns (i2, j2)
    cut = torch.linalg.svdvals(unfolded)[2:].square().sum()
    found = multiplied(factored(matrix, (2, 3), (3, 2), bond=2))
    assert float((found - matrix).square().sum()) == pytest.approx(float(cut))


def made(mask: float = -1.0) -> MpoExperts:
    up, down = torch.randn(12, 12), torch.randn(12, 12)
    return MpoExperts(up, down, COLUMNS, ROWS, router(12, 4), mask=mask)


def test_experts_are_what_their_tensors_multiply_to() -> None:
    layer = seeded(made)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # each expert goes its way
    p = arrays(layer)
    up, down = ([linear.matrix(e).detach().numpy() for e in range(4)] for linear in (layer.up, layer.down))
    assert not np.allclose(up[0], up[1])
    experts = [lambda row, e=e: down[e] @ gelu(up[e] @ row) for e in range(4)]
    x_BLD = torch.randn(1, 7, 12, dtype=torch.float64)
    y_LD = [routed(row, p["router.weight"], experts) for row in x_BLD[0].numpy()]
    np.testing.assert_allclose(layer(x_BLD, Context())[0][0].detach().numpy(), y_LD, atol=1e-9)


def test_most_numbers_are_shared() -> None:
    """The central tensor is there once, and the others once per expert."""
    layer = made()
    central = layer.up.central.numel()
    own = sum(stack.numel() for stack in layer.up.auxiliary)
    assert layer.up.central.shape == (4, 3, 2, 6) and own == 4 * (16 + 36) and central + own < 4 * 144


@pytest.mark.parametrize(("mask", "learns"), [(0.0, True), (1.0, False)])
def test_a_masked_centre_does_not_learn_and_the_output_is_the_same(mask: float, learns: bool) -> None:
    layer, x_BLD = seeded(lambda: made(mask)), torch.randn(1, 9, 12, dtype=torch.float64)
    y_BLD, _ = layer(x_BLD, Context(training=True))
    y_BLD.sum().backward()
    assert (layer.up.central.grad is not None) == learns and layer.up.auxiliary[0].grad is not None
    torch.testing.assert_close(y_BLD, layer(x_BLD, Context())[0])


def test_the_mask_comes_as_often_as_it_is_said_to() -> None:
    """Of four experts three times in four; in use never."""
    layer, x_BLD = seeded(made), torch.randn(1, 3, 12, dtype=torch.float64)
    context = Context(training=True, generator=torch.Generator().manual_seed(0))
    masked = 0
    for _ in range(100):
        layer.zero_grad()
        layer(x_BLD, context)[0].sum().backward()
        masked += layer.up.central.grad is None
    assert 62 < masked < 86
    layer(x_BLD, Context())[0].sum().backward()
    assert layer.up.central.grad is not None


def test_sizes_that_do_not_fit_are_refused() -> None:
    for hidden, width in (((2, 3), (2, 6)), ((12,), (12,)), ((3, 2, 2), (6, 2))):
        with pytest.raises(ValueError, match=r"multiply|factors"):
            MpoExperts(torch.randn(12, 12), torch.randn(12, 12), hidden, width, router(12, 4))
