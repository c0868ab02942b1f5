"""The end of a training: an ordinary checkpoint with the source's names, types and side files, and its provenance."""

from __future__ import annotations

import json
import secrets
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moectl.checkpoint.expressions import Extent
from moectl.checkpoint.fs import FileSystem
from moectl.checkpoint.hashing import Hasher
from moectl.checkpoint.plan import PROVENANCE, source_identity
from moectl.checkpoint.provenance import SCHEMA, sha256_file
from moectl.checkpoint.source import Checkpoint
from moectl.errors import CheckFailed
from moectl.integrations.complete import check_complete, is_routed
from moectl.layerwise.quiet import quiet
from moectl.layerwise.skeleton import read_config
from moectl.text import escape
from moectl.training.adapters import Adapter, Source, sources_of, write_adapter
from moectl.training.model import load_model
from moectl.training.recipe import TrainRecipe

SHARD_BYTES = "5GB"


def publish(
    tensors: dict[str, Any],
    source: Source,
    recipe: TrainRecipe,
    fingerprint: str,
    root: Path,
    out: Path,
    *,
    like: Source,
    overwrite: bool = False,
) -> None:
    """Write the trained tensors as what `like` is, check that it loads, rename it to `out`.

    They come by their names in memory, an adapter's by those on disk.

    Every tensor is rounded once to the type the source stores it in. `root`, the partial output, is removed.

    Raises:
        CheckFailed: the written checkpoint does not load completely.
    """
    fs = FileSystem()
    target = root / "model"
    fs.remove_tree(target)
    written = write_adapter(like, tensors, target) if isinstance(like, Adapter) else _write(like, tensors, target)
    metrics = root / "train"
    if metrics.is_dir():
        shutil.copytree(metrics, target / metrics.name)
    (target / PROVENANCE).write_text(_provenance(written, source, recipe, fingerprint))
    for path in target.rglob("*"):
        _sync(fs, path)
    fs.sync_directory(target)
    if overwrite and out.exists():
        fs.rename(out, root / f"replaced-{secrets.token_hex(4)}")
    fs.rename(target, out)
    fs.sync_directory(out.parent)
    fs.remove_tree(root)


def _write(source: Checkpoint, tensors: dict[str, Any], target: Path) -> Checkpoint:
    # A fresh model of the source has its types and classes; the trained one may be sharded and is float32 throughout.
    model = load_model(source, "eager", dtype="auto")
    model.load_state_dict(tensors)
    with quiet():
        model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    card = source.path / "README.md"
    for side in [*source.side_files(), *([card] if is_routed(source) and card.exists() else [])]:
        shutil.copyfile(side, target / side.name)
    written = Checkpoint.open(target)
    _check_loads(written, source)
    return written


def _check_loads(written: Checkpoint, source: Checkpoint) -> None:
    """Compare the names with the source's; where they differ (a source with fused experts), let transformers say."""
    if written.tensors.keys() == source.tensors.keys():
        return
    with quiet():
        auto = AutoModelForSeq2SeqLM if read_config(written).is_encoder_decoder else AutoModelForCausalLM
        info = auto.from_pretrained(
            written.path,
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )[1]
    try:
        check_complete(written, info)
    except ValueError as error:
        raise CheckFailed(
            f"The trained checkpoint in {escape(str(written.path))} does not load completely.",
            str(error),
            "Nothing is lost: the same command writes it again from the last checkpoint.",
        ) from error


def _provenance(written: Checkpoint, source: Source, recipe: TrainRecipe, fingerprint: str) -> str:
    with Hasher() as hasher:
        futures = {
            name: hasher.submit((Extent(ref.file, ref.offset, ref.nbytes),)) for name, ref in written.tensors.items()
        }
        hashes = {name: future.result().sha256 for name, future in futures.items()}
    weights = {ref.file.name for ref in written.tensors.values()}
    files = {
        path.name: sha256_file(path)
        for path in sorted(written.path.iterdir())
        if path.is_file() and path.name not in weights and path.name != "README.md"
    }
    document = {
        "schema": SCHEMA,
        "moectl": version("moectl"),
        "recipe": {"method": "train", **recipe.to_json()},
        "sources": [source_identity(each) for each in sources_of(source)],
        "fingerprint": fingerprint,
        "files": files,
        "tensors": hashes,
    }
    return json.dumps(document, indent=2) + "\n"


def _sync(fs: FileSystem, path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            fs.sync(file.fileno())
