"""What the drivers of other tools share: their arguments, and experts' weights as plain matrices.

Nothing but numpy, torch and safetensors is imported: each driver runs in the environment of its own tool.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

MATRIX = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")


def stored(out: Path) -> dict[str, dict[str, Tensor]]:
    """What a tool has stored of each expert matrix, by module and by the end of the name."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, leaf = name.rpartition(".")
            if MATRIX.fullmatch(f"{module}.weight"):
                found.setdefault(module, {})[leaf] = tensor
    return found


def run(quantise: Callable[[argparse.Namespace], None], plain: Callable[[Path], Iterable[tuple[str, Tensor]]]) -> None:
    """Either quantise (this is timed) or turn what was made into plain matrices (this is not)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["quantise", "plain"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--plain", type=Path)
    options = parser.parse_args()
    if options.what == "quantise":
        quantise(options)
    else:
        matrices = {name: matrix.float().contiguous() for name, matrix in plain(options.out)}
        strange = [name for name in matrices if not MATRIX.fullmatch(name)]
        assert not strange, strange
        save_file(matrices, options.plain)
