"""Mixture-of-Depths (arXiv 2404.02258): decoder layers that only some tokens of a sequence pass through.

Legend: B sequences, L tokens each, C of them chosen; D hidden, W head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import InputError
from moectl.integrations.routed.held import Held, Seen
from moectl.routers.mod import Mod
from moectl.routers.protocol import counts
from moectl.text import shown


class HeldLayer(Held):
    """A decoder layer with a router before it: y = x + r * (layer(x) - x) for the tokens that r takes, x for others.

    The layer's attention sees the chosen tokens alone, in their order and at their own positions (eq. 1). Nothing is
    cached: what a token attends to is decided anew with every pass.
    """

    router: Mod

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """Hidden states [B, L, D], and whatever the family hands its layers -> what they return.

        Raises:
            InputError: keys and values are to be cached, or an argument is not known to be of single tokens.
        """
        if arguments or named.get("past_key_values") is not None:
            raise InputError(
                "A layer of Mixture-of-Depths was given a cache.",
                "Which tokens it attends to is decided anew with every pass.",
                "Run the model with use_cache=False.",
            )
        hidden_TD = hidden_states.flatten(0, 1)
        context = self.passing.context(hidden_TD, training=self.training)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            found = self.router.route(self.router.score(hidden_TD, context), context)
        if self.training:
            self.seen = Seen(counts(found.index_TK, 1), found.aux_loss)
        B, L, D = hidden_states.shape
        through_BL = (found.index_TK[:, 0] == 0).view(B, L)
        weight_BL1 = found.weight_TK.to(hidden_states.dtype).view(B, L, 1)
        outputs = []
        for chosen in _alike(through_BL):
            rows_BL = through_BL[chosen]
            place_BC = rows_BL.nonzero()[:, 1].view(len(rows_BL), -1)
            given_BLD = hidden_states[chosen]
            if not place_BC.shape[1]:
                outputs.append(given_BLD)
                continue
            place_BCD = place_BC[..., None].expand(-1, -1, D)
            taken_BCD = given_BLD.gather(1, place_BCD)
            inside = {name: _taken(name, value, place_BC, chosen, L) for name, value in named.items()}
            out = super().forward(taken_BCD, **inside)
            out_BCD = out[0] if isinstance(out, tuple) else out
            weight_BC1 = weight_BL1[chosen].gather(1, place_BC[..., None])
            outputs.append(given_BLD.scatter_add(1, place_BCD, weight_BC1 * (out_BCD - taken_BCD)))
        return torch.cat(outputs)


def _alike(through_BL: Tensor) -> list[slice]:
    """All sequences at once if as many tokens of each go through, as in training; else one after the other."""
    counted = through_BL.sum(1)
    if (counted == counted[0]).all():
        return [slice(0, len(counted))]
    return [slice(row, row + 1) for row in range(len(counted))]


def _taken(name: str, value: Any, place_BC: Tensor, chosen: slice, length: int) -> Any:
    """What of an argument is about the chosen tokens of the chosen sequences."""
    if name == "position_embeddings":
        return tuple(_rows(part_BLW, place_BC, chosen) for part_BLW in value)
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids":
        return _rows(value[..., None], place_BC, chosen)[..., 0]
    if name == "attention_mask" and value.ndim == 4:
        mask_BHLL = value[chosen] if len(value) > 1 else value.expand(len(place_BC), -1, -1, -1)
        rows = place_BC[:, None, :, None].expand(-1, mask_BHLL.shape[1], -1, mask_BHLL.shape[3])
        columns = place_BC[:, None, None, :].expand(-1, mask_BHLL.shape[1], place_BC.shape[1], -1)
        return mask_BHLL.gather(2, rows).gather(3, columns)
    if length not in value.shape:
        return value
    raise InputError(
        f"The decoder layers are given {shown(name)!r}, {list(value.shape)}.",
        "What of it belongs to the tokens that pass through a layer of Mixture-of-Depths is not known.",
        "Give a model of another family, or attention without that argument.",
    )


def _rows(part_BLW: Tensor, place_BC: Tensor, chosen: slice) -> Tensor:
    """Of each sequence, the rows of its chosen tokens [B, C, W]; a single one stands for all sequences."""
    part_BLW = part_BLW[chosen] if len(part_BLW) > 1 else part_BLW.expand(len(place_BC), -1, -1)
    return part_BLW.gather(1, place_BC[..., None].expand(-1, -1, part_BLW.shape[-1]))


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """A decoder's layers by name.

    Raises:
        InputError: it has no such list.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} has no list of decoder layers.",
            "Mixture-of-Depths lets tokens pass around whole layers of a decoder.",
            "Give a decoder-only model.",
        )
    wanted = set(layers)
    return {name: module for name, module in model.named_modules() if module in wanted}
