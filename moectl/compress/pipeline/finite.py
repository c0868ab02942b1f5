"""NaN and infinity in weights and activations: whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from moectl.checkpoint.dtypes import FLOATS
from moectl.checkpoint.header import TensorRef
from moectl.errors import InputError
from moectl.layerwise.replay import Replay
from moectl.layerwise.tensors import read_tensor
from moectl.text import escape


def require_finite(replay: Replay, weight_GRN: Tensor, names: Sequence[str]) -> None:
    """Refuse weights that are not finite.

    Args:
        names: of the parameters they are from.

    Raises:
        InputError: names the tensor on disk and its file, or the parameter that only the conversion made so.
    """
    if not weight_GRN.isfinite().all():
        ref = _first(replay, names)
        raise _nonfinite(ref) if ref else _too_large(replay, f"parameter {escape(names[0])!r}")


def overflow(replay: Replay, index: int) -> InputError:
    """The error for activations that are not finite: the first tensor up to that layer that explains it, or none."""
    layers = [f"{name}." for name in replay.names[: index + 1]]
    outside = [name for names in replay.outside.values() for name in names]
    inside = [name for prefix in layers for name in replay.sources if name.startswith(prefix)]
    ref = _first(replay, [*inside, *outside])
    if ref is not None:
        return _nonfinite(ref)
    return _too_large(replay, f"what layer {index} computes")


def _first(replay: Replay, names: Iterable[str]) -> TensorRef | None:
    """The first tensor on disk of some parameters that holds NaN or infinity."""
    for name in names:
        for source in replay.sources.get(name, ()):
            ref = replay.checkpoint.tensors[source]
            if ref.dtype in FLOATS and not read_tensor(ref).float().isfinite().all():
                return ref
    return None


def _too_large(replay: Replay, what: str) -> InputError:
    dtype = str(replay.model.dtype).removeprefix("torch.")
    return InputError(
        f"{escape(replay.checkpoint.name)}: {what} is not finite in {dtype}.",
        "The weights on disk are, so they are too large for it.",
        "Mend the weights." if dtype == "float32" else "Give --dtype float32.",
    )


def _nonfinite(ref: TensorRef) -> InputError:
    return InputError(
        f"{escape(str(ref.file))}: tensor {escape(ref.name)!r} holds NaN or infinity.",
        "It cannot be quantised, and every output of such a model can be NaN.",
        "Fetch the checkpoint again, or mend the tensor.",
    )
