"""Where scores come from: a file that holds them, or the model, run on text or looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moectl.checkpoint.kept import identity, kept_name
from moectl.compress.calibration import Calibration, calibration_tokens, tokens_identity
from moectl.compress.prune.layout import Layout
from moectl.compress.prune.recipe import PruneRecipe, check_subsets
from moectl.compress.prune.scores import Measured, Scores, naee_name, read_scores, require_same_about, write_scores

Say = Callable[[str], None]


def scores_for(
    layout: Layout, recipe: PruneRecipe, calibration: Calibration, place: Path, file: Path | None, say: Say
) -> Scores | None:
    """How much the experts matter: from `file` if it is there, else measured and kept there, or in `place`.

    None if no expert has to go. `say` hears of what takes time.

    Raises:
        UsageError: the method tries too many subsets, or the options contradict the file.
        InputError: model, data or file cannot be used.
        MachineError: there is no such device, or the Hub cannot be reached.
    """
    kept = recipe.kept(layout)
    if kept == layout.experts:
        return None
    if recipe.method == "naee":
        check_subsets(layout, kept)
    if file is not None and file.exists():
        scores = read_scores(file, layout, recipe.method, kept)
        if "data" in scores.about:
            require_same_about(scores, file, calibration.asked)
        return scores
    if recipe.method == "aimer":
        path = file or place / kept_name("scores", {**identity(layout.source), "statistics": "aimer"})
        if not path.exists():
            from moectl.compress.prune.saliency import weight_scores

            say("Reading the weights of all experts")
            write_scores(path, layout, weight_scores(layout), {})
        return read_scores(path, layout, recipe.method, kept)
    token_BL = calibration_tokens(layout.source, calibration)
    about = calibration.about(token_BL)
    name = naee_name(kept) if recipe.method == "naee" else "routed"
    decides = {**identity(layout.source), "statistics": name, "tokens": tokens_identity(token_BL), "about": about}
    path = file or place / kept_name("scores", decides)
    if not path.exists():
        say(f"Choosing experts on {token_BL.size:,} tokens of {', '.join(about['data'])}")
        write_scores(path, layout, _measured(layout, recipe, calibration, token_BL, kept), about)
    return read_scores(path, layout, recipe.method, kept)


def _measured(
    layout: Layout, recipe: PruneRecipe, calibration: Calibration, token_BL: np.ndarray, kept: int
) -> Measured:
    import torch

    from moectl.compress.prune.naee import best_subsets
    from moectl.compress.prune.saliency import routed_scores
    from moectl.layerwise.model import LayerwiseModel
    from moectl.layerwise.skeleton import read_config
    from moectl.layerwise.whole import check_ids, device_named, dtype_named

    device = device_named(calibration.device)
    dtype = dtype_named(calibration.dtype, device)
    if dtype == "auto":
        dtype = getattr(read_config(layout.source), "dtype", None) or torch.float32
    model = LayerwiseModel.open(layout.source, dtype, device)
    check_ids(layout.source, model.model, token_BL)
    if recipe.method == "naee":
        return best_subsets(model, token_BL, layout, kept)
    return routed_scores(model, token_BL, layout)
