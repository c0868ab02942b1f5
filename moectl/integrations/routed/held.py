"""A router of `moectl.routers` where a family's own stood, handing over its choice as that one did.

Legend: B sequences, L tokens each, T = B * L; D hidden, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moectl.errors import UsageError
from moectl.routers.protocol import NO_EXPERT, Context, Router, counts

Form = Literal["index", "mask"]
"""How a family's router hands over its choice: (logits, weights [T, K], index [T, K]), as nearly all do, or (dispatch
mask [B, L, E], weight [B, L, 1], logits), as Switch does."""


@dataclass
class Passing:
    """What the routers of one model are told of the pass that is going on.

    Attributes:
        token_BL: what was last looked up in an embedding: the ids of the stack that is running.
        progress: which share of the training is done; 1 in use.
    """

    token_BL: Tensor | None = None
    progress: float = 1.0

    def hear(self, _embedding: nn.Module, given: tuple[Any, ...]) -> None:
        """Note the token ids on their way into an embedding."""
        self.token_BL = given[0] if given else None

    def context(self, hidden_TD: Tensor, *, training: bool) -> Context:
        """What a router may look at; the sequences of a batch are apart, as far as their ids were seen.

        Everything that is drawn comes from torch's own generator, whose seed a training sets at every step.
        """
        token_BL = self.token_BL
        if token_BL is None or token_BL.numel() != len(hidden_TD):
            return Context(training, hidden_TD, progress=self.progress)
        B, L = token_BL.shape
        sequence_T = torch.arange(B, device=hidden_TD.device).repeat_interleave(L)
        token_T = token_BL.flatten().to(hidden_TD.device)
        return Context(training, hidden_TD, token_T, sequence_T, progress=self.progress)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass in training leaves behind: how many assignments each expert got [E], and the router's losses."""

    load_E: Tensor
    aux_loss: Tensor


class Held(nn.Module):
    """What all modules with a router in them share.

    Attributes:
        router: the rule and its gate.
        num_experts: that it chooses among.
        seen: of the last pass in training.
    """

    router: Router
    num_experts: int
    passing: Passing
    seen: Seen | None

    def hold(self, router: Router, passing: Passing) -> None:
        """Take a router, which transformers is not to initialise."""
        for module in router.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self._is_hf_initialized = True
        self.router = router
        self.num_experts = router.num_experts
        self.passing = passing
        self.seen = None

    def take(self) -> Seen | None:
        """What the last pass in training left, once."""
        seen, self.seen = self.seen, None
        return seen

    def share(self, sequence_length: int) -> float:
        """Of the experts' work if every expert took every token, what they do."""
        active = self.router.active
        return 1.0 if active is None else min(1.0, active / self.num_experts)


class HeldRouter(Held):
    """In the place of a family's router, whose class it is also one of, so that transformers records its logits."""

    form: Form

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, D] or [B, L, D] -> what the family's router gives for them.

        A token without an expert is sent to the first with a weight of 0, which adds nothing under any implementation
        of experts.

        Raises:
            UsageError: a token has several experts, and the family takes one.
        """
        hidden_TD = hidden_states.flatten(0, -2)
        context = self.passing.context(hidden_TD, training=self.training)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            scores_TE = self.router.score(hidden_TD, context)
            found = self.router.route(scores_TE, context)
        if self.training:
            self.seen = Seen(counts(found.index_TK, self.num_experts), found.aux_loss)
        index_TK = found.index_TK.clamp(min=0)
        if self.form == "index":
            return scores_TE, found.weight_TK, index_TK
        if index_TK.shape[1] != 1:
            raise UsageError(
                f"{type(self.router).__name__} takes {index_TK.shape[1]} experts per token, and this model one.",
                "The experts of its family are given one weight per token.",
                "Give a router of one expert per token (top_k=1), or a model of another family.",
            )
        mask_TE = nn.functional.one_hot(index_TK[:, 0], self.num_experts) * (found.index_TK != NO_EXPERT)
        shape = hidden_states.shape[:-1]
        weight_T1 = found.weight_TK.to(hidden_states.dtype)
        return mask_TE.view(*shape, -1), weight_T1.view(*shape, 1), scores_TE.view(*shape, -1)


def become(module: nn.Module, kind: type[Held], *, kept: Collection[str] | None = ()) -> Any:
    """Make a module one of `kind` too, without its parameters and parts but those `kept` (None: all of them).

    Its plain attributes stay.
    """
    for held in (module._parameters, module._buffers, module._modules):
        for name in [name for name in held if kept is not None and name not in kept]:
            del held[name]
    module.__class__ = _both(kind, type(module))  # type: ignore[arg-type] # classes are hashable, mypy 1.x says not
    return module


@cache
def _both(kind: type[Held], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{base.__name__}", (kind, base), {"__module__": base.__module__})
