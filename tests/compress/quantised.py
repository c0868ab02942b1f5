"""Matrices and Hessians to quantise in tests, and what reading a stored piece gives."""

import gptq_by_hand
import numpy as np
import torch
from hypothesis import strategies as st

from moectl.codecs.matrix import parse
from moectl.compress.quantise.piece import to_numpy

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def correlated(matrices, rows, width, seed=0, outliers=0.7, decay=0.7):
    """Weights of normal rows and second moments of correlated inputs of different sizes, float32."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(outliers * rng.standard_normal((matrices, width)))
    plain = np.stack([gptq_by_hand.hessian(4 * width, width, decay, seed + index) for index in range(matrices)])
    weight = rng.standard_normal((matrices, rows, width)) * 0.02
    return torch.tensor(weight).float(), torch.tensor(plain * sizes[:, :, None] * sizes[:, None]).float()


@st.composite
def any_problem(draw):
    """Matrices of any shape, some rows of which are zero, of one sign or constant, with any kind of Hessian."""
    matrices, rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = rng.standard_normal((matrices, rows, width)) * 10.0 ** draw(st.integers(-4, 2))
    for index, kind in enumerate(draw(st.lists(st.sampled_from("z+-c."), max_size=rows))):
        row = weight[:, index]
        changed = {"z": 0 * row, "+": np.abs(row), "-": -np.abs(row), "c": np.full_like(row, row.flat[0]), ".": row}
        weight[:, index] = changed[kind]
    tokens = draw(st.sampled_from([None, 0, 1, width // 2, 2 * width]))
    if tokens is None:
        return torch.tensor(weight).float(), None
    inputs = rng.standard_normal((matrices, tokens, width)) * (rng.random(width) < 0.9)
    return torch.tensor(weight).float(), torch.tensor(np.einsum("gtn,gtm->gnm", inputs, inputs)).float()


def read_back(chosen, piece, transposed=False):
    """The blob of a stored piece."""
    return parse("m", chosen.store("m", piece, transposed=transposed, stacked=True))


def assert_reads_as_dense(chosen, piece, dtype):
    """What is stored decodes to what the method says, to the bit, and in the type of the checkpoint."""
    blob, dense = read_back(chosen, piece), chosen.dense(piece)
    assert dense.dtype == torch.float32 and torch.equal(dense.to(dtype).float(), dense)
    assert blob.weights().tobytes() == to_numpy(dense.to(dtype)).tobytes()


def assert_error_is_told(chosen, weight, hessian, piece, rtol=1e-4):
    """`error_G` is the error of what is read back, calculated directly in float64."""
    dense = chosen.dense(piece)
    direct = [gptq_by_hand.error(*parts) for parts in zip(weight, dense, hessian, strict=True)]
    assert torch.allclose(piece["error_G"].double(), torch.tensor(direct, dtype=torch.float64), rtol=rtol, atol=1e-6)
