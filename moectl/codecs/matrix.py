"""A coded matrix of either kind, by its name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moectl.codecs import blob, grid


def parse(name: str, tensors: Mapping[str, np.ndarray]) -> blob.Blob | grid.GridBlob:
    """The matrix of a name among tensors that were read; NAME.about tells by its length of which kind it is.

    Raises:
        InputError: a tensor is missing, has another type or shape, or they do not fit together: it is named.
    """
    about = tensors.get(f"{name}.about")
    return (grid if about is not None and about.shape == (grid.ABOUT_NUMBERS,) else blob).parse(name, tensors)
