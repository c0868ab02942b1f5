"""A coded checkpoint made an ordinary one: decoded layer by layer into files, and from them and the source a plan.

In memory there is about a layer at a time (1.3 times its size, of experts whose up- and gate-projection are one tensor
in memory and two on disk). On the disk there is, until it is done, everything that is decoded twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file

from moectl.checkpoint.card import inherited
from moectl.checkpoint.dtypes import FLOATS, TORCH_NAMES
from moectl.checkpoint.expressions import Copy
from moectl.checkpoint.fs import FileSystem, free_bytes
from moectl.checkpoint.header import TensorRef
from moectl.checkpoint.kept import identity, kept_name
from moectl.checkpoint.plan import OutputTensor, Plan, planned
from moectl.checkpoint.provenance import read_provenance
from moectl.checkpoint.source import Checkpoint
from moectl.compress.decoding import Decoding
from moectl.errors import InputError, MachineError, UsageError
from moectl.families.components import experts_and_top_k
from moectl.layerwise.tensors import TORCH_DTYPES
from moectl.text import escape, shown

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def layer_files(
    decoding: Decoding, place: Path, on_layer: Callable[[str], object] = lambda _: None
) -> list[Checkpoint]:
    """The decoded layers as files in `place`; those that are there are taken as they are.

    Raises:
        InputError: the source is damaged, or changes meanwhile.
    """
    found = []
    for layer in decoding.layers:
        path = place / _file_name(decoding, layer)
        if not path.exists():
            place.mkdir(parents=True, exist_ok=True)
            work = path.with_name(f".{path.name}.{os.getpid()}")
            save_file({name: tensor.contiguous() for name, tensor in decoding.decode(layer).items()}, work)
            FileSystem().rename(work, path)
        on_layer(layer)
        found.append(Checkpoint.of_file(path))
    decoding.source.check_unchanged()
    return found


def imagined_files(decoding: Decoding, place: Path) -> list[Checkpoint]:
    """The same for a plan that is only shown: nothing is decoded, and there are no files."""
    found = []
    for layer in decoding.layers:
        file = place / _file_name(decoding, layer)
        described = decoding.describe(layer).items()
        refs = {
            name: TensorRef(name, _NAMES[tensor.dtype], tuple(tensor.shape), file, 0, tensor.nbytes)
            for name, tensor in described
        }
        found.append(Checkpoint(place, file.stem, None, {}, refs, {}, file=file))
    return found


def plan_decompress(decoding: Decoding, files: Iterable[Checkpoint], dtype: str, shard_bytes: int) -> Plan:
    """The plan of the ordinary checkpoint.

    Args:
        files: one for each layer of `decoding`, in its order.
        dtype: of floating-point tensors; auto leaves each as it is.

    Raises:
        UsageError: the dtype is not known.
    """
    source, sources = decoding.source, (decoding.source, *files)
    check_dtype(dtype)
    tensors = tuple(_tensors(decoding, sources, TORCH_NAMES.get(dtype)))
    config = {name: value for name, value in source.config.items() if name != "quantization_config"}
    if dtype != "auto":
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    if decoding.way:
        config["quantization_config"] = decoding.way.config()
    parameters, of_experts = _counts(decoding)
    experts, top_k = experts_and_top_k(source.config)
    recipe = {
        "method": "decompress",
        "dtype": dtype,
        "export": decoding.way and decoding.way.form,
        "quantization": source.config["quantization_config"],
        "key": kept_name("decompress", {"source": identity(source)}),
    }
    return Plan(
        sources=sources,
        tensors=tensors,
        recipe=recipe,
        config=config,
        shard_bytes=shard_bytes,
        files={"README.md": _card(source, decoding.way.form if decoding.way else None)},
        facts={
            "family": source.model_type,
            "source_family": source.model_type,
            "parameters": parameters,
            "active_parameters": parameters - (of_experts * (experts - top_k) // experts if experts and top_k else 0),
            "source_bytes": source.nbytes,
            "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        },
    )


def is_made(out: Path, plan: Plan) -> bool:
    """Whether `out` is what a plan like this made of the same files, untouched since."""
    try:
        return read_provenance(out).get("recipe") == json.loads(json.dumps(dict(plan.recipe)))
    except InputError:
        return False


def check_space(plan: Plan, out: Path) -> None:
    """Refuse a disk on which what is decoded has no place, as files of layers and then in the output.

    Raises:
        MachineError: it is too small.
    """
    layers = sum(ref.nbytes for source in plan.sources[1:] for ref in source.tensors.values() if not ref.file.exists())
    needed, free = plan.file_bytes + layers, free_bytes(out)
    if needed > free:
        raise MachineError(
            f"{escape(str(out))}: {needed} bytes are needed and {free} are free.",
            f"What is decoded takes {layers} bytes as files of layers, which are removed at the end.",
            "Make room, or choose another disk with -o.",
        )


def check_dtype(dtype: str) -> None:
    """Refuse a `--dtype` that nobody knows.

    Raises:
        UsageError: it is none of auto, bfloat16, float16 and float32.
    """
    if dtype != "auto" and (dtype not in TORCH_NAMES or dtype == "float64"):
        raise UsageError(f"--dtype {shown(dtype)!r} is not known.", "", "Give auto, bfloat16, float16 or float32.")


def _tensors(decoding: Decoding, sources: tuple[Checkpoint, ...], dtype: str | None) -> Iterable[OutputTensor]:
    """In the source's order; a layer's decoded tensors come where the first of its coded ones was."""
    place_of = {
        name: place
        for place, names in enumerate(decoding.layers.values(), start=1)
        for each in names
        for name in decoding.origin(each)
    }
    written: set[int] = set()
    for name in sources[0].tensors:
        place = place_of.get(name, 0)
        if place in written:
            continue
        if place:
            written.add(place)
        for each in sources[place].tensors if place else (name,):
            kept = sources[place].tensors[each].dtype
            yield planned(each, Copy(each, place), sources, dtype if dtype and kept in FLOATS else kept)


def _counts(decoding: Decoding) -> tuple[int, int]:
    """Parameters in all, and those of experts."""
    sizes = {name: decoding.model.get_parameter(name).numel() for name in decoding.coded}
    used = {stored for name in sizes for stored in decoding.origin(name)}
    plain = sum(math.prod(ref.shape) for name, ref in decoding.source.tensors.items() if name not in used)
    of_experts = sum(size for name, size in sizes.items() if "about" in decoding.coded[name])
    return plain + sum(sizes.values()), of_experts


def _card(source: Checkpoint, form: str | None) -> str:
    name = escape(source.name)
    lines = [
        "---",
        *("library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, moectl]", *inherited(source)),
        "---",
        "",
        f"# {name}, {f'as {form}' if form else 'decompressed'}",
        "",
        f"It computes what `{name}` does: what compressing that has cost is not undone.",
    ]
    if form:
        lines += ["", "Its experts are packed by compressed-tensors, which transformers needs to load it; vLLM has it."]
    return "\n".join(lines) + "\n"


def _file_name(decoding: Decoding, layer: str) -> str:
    decides = {"layer": layer, "source": identity(decoding.source), "export": decoding.way and decoding.way.config()}
    return kept_name("decoded", decides)
