"""One decoder layer in its turn, with the files it is worked on with.

Everything that passes from one step to the next lies in files of a folder: a step that was interrupted goes on after
the last file that is whole, and several processes share the folder and the work. Which process did what does not show
in any file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moectl.compress.pipeline.finite import overflow
from moectl.compress.pipeline.ranks import Ranks
from moectl.compress.pipeline.settings import Settings
from moectl.compress.pipeline.stacks import candidates, experts_modules, is_direct
from moectl.layerwise.malloc import give_back
from moectl.layerwise.replay import Replay, Returned, Tokens
from moectl.layerwise.stored import read_tree, write_tree

if TYPE_CHECKING:
    from moectl.compress.quantise.method import Method


@dataclass(frozen=True)
class LayerWork:
    """A layer in its turn.

    Attributes:
        replay: the model; the layer's weights are in memory.
        index: the layer's number.
        batches: token ids of the micro-batches.
        before: the folder with what the layer before it in its stack returned; None for the first.
        encoded: that of the last layer of the encoder; for layers of a decoder that has one.
        folder: for what is seen, decided and returned here.
        advance: told which part of the layer is done.
    """

    replay: Replay
    index: int
    batches: Sequence[Tokens]
    before: Path | None
    encoded: Path | None
    folder: Path
    method: Method
    settings: Settings
    ranks: Ranks
    advance: Callable[[float], None]

    @property
    def name(self) -> str:
        """The layer's, in memory."""
        return self.replay.names[self.index]

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Those of the experts that can be matrices, by their names in memory."""
        return candidates(self.name, self.replay.layers[self.index])

    @cached_property
    def experts(self) -> nn.Module | None:
        """The module of experts that is given a choice and can be shown any rows; None if they are wired otherwise."""
        modules = list(experts_modules(self.replay.layers[self.index]).values())
        return modules[0] if is_direct(modules) else None

    def run(self, number: int, *, watched: bool = False) -> Returned:
        """What the layer makes of a micro-batch.

        Args:
            watched: look whether that is all it leaves for later layers.
        """
        folders = (self.before, self.encoded)
        before, encoded = (None if each is None else read_tree(left_file(each, number)) for each in folders)
        run = self.replay.run_watched if watched else self.replay.run
        return run(self.batches[number], before, encoded)

    def leave(self) -> None:
        """Run the layer as it is now, and store what it returns of every micro-batch.

        Raises:
            InputError: that is not finite, or not all that the layer leaves for later ones.
        """
        mine = self.ranks.mine(len(self.batches))
        for number in mine:
            path = left_file(self.folder, number)
            if not path.exists():
                after = self.run(number, watched=number == mine.start)
                if not _hidden_states(after).isfinite().all():
                    raise overflow(self.replay, self.index)
                write_tree(path, after)
                del after
                give_back()
            self.advance(0.75 + 0.25 * number / len(self.batches))
        self.ranks.wait()

    def clear(self) -> None:
        """Remove all files but those of what the layer returned."""
        for path in self.folder.iterdir():
            if not path.name.startswith("left-"):
                path.unlink()

    def file(self, kind: str, number: int) -> Path:
        """A file of a kind in the layer's folder."""
        return self.folder / f"{kind}-{number:05d}.safetensors"


def left_file(folder: Path, number: int) -> Path:
    """What a layer returned of a micro-batch."""
    return folder / f"left-{number:05d}.safetensors"


def _hidden_states(after: Returned) -> Tensor:
    """The first of what a layer returns."""
    return after[0][0] if isinstance(after[0], tuple) else after[0]
