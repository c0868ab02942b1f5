"""NaN and infinity in a source: said with names and counts, and refused unless the user wants them."""

from __future__ import annotations

from collections.abc import Mapping

from moectl.checkpoint.expressions import Extent, leaves
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.plan import OutputTensor, Plan
from moectl.errors import InputError
from moectl.text import escape

_SHOWN = 8


def by_source_tensor(plan: Plan, found: Mapping[Extent, int]) -> dict[str, int]:
    """Counts of what is not finite by the source tensor that the byte range lies in, zeros left out."""
    counts: dict[str, int] = {}
    for extent, count in found.items():
        if count:
            name = _label(plan, extent)
            counts[name] = counts.get(name, 0) + count
    return counts


def search(plan: Plan, tensor: OutputTensor, hasher: Hasher) -> dict[str, int]:
    """What is not finite in everything an output tensor is computed from; reads it all."""
    refs = {plan.sources[leaf.source].tensors[leaf.tensor] for leaf in leaves(tensor.expression)}
    futures = {}
    for ref in sorted(refs, key=lambda ref: ref.name):
        extent = Extent(ref.file, ref.offset, ref.nbytes)
        futures[extent] = hasher.submit((extent,), ref.dtype)
    return by_source_tensor(plan, {extent: sum(future.result().nonfinite) for extent, future in futures.items()})


def nonfinite_error(counts: Mapping[str, int], *, computed: bool = False) -> InputError:
    """The error for weights that are not finite."""
    shown = ", ".join(f"{escape(name)} ({count})" for name, count in list(counts.items())[:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more tensors" if len(counts) > _SHOWN else ""
    accept = "" if computed else ", or give --allow-nonfinite to copy it as it is"
    return InputError(
        f"The weights hold NaN or infinity: {shown}{more}.",
        "Every output of such a model can be NaN, so it was not published.",
        f"Look at it with `moectl inspect MODEL --weights`; mend it and give --overwrite{accept}.",
    )


def _label(plan: Plan, extent: Extent) -> str:
    for source in plan.sources:
        for ref in source.tensors.values():
            if ref.file == extent.file and ref.offset <= extent.offset < ref.offset + ref.nbytes:
                return ref.name if len(plan.sources) == 1 else f"{ref.name} of {source.name}"
    raise AssertionError(f"{extent} lies in no source tensor")
