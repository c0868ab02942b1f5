"""A frozen FFN with adapter experts behind it.

Legend: T tokens, D hidden_size, R adapter_dim, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from moe_kernels import Activation, expert_mlp, route
from moectl.errors import InputError
from moectl.integrations.pesc.balance import Recorder, Routing
from moectl.integrations.pesc.config import PescConfig

GELU = Activation("gelu", gated=False)

NO_MERGE = (
    "PESC adapters cannot be merged into the model.",
    "They stand behind the FFN and each token chooses its own, so no weight of the FFN can hold them.",
    "Keep the adapter and load it with PeftModel.from_pretrained(model, ADAPTER).",
)


class PescLayer(nn.Module, BaseTunerLayer):
    """`y + sum_j w_j s W_up_j gelu(W_down_j y)` with y = FFN(x), w = softmax over the top k of W_r x.

    The router reads the FFN's input, the adapters its output (arXiv 2401.02731, equations 5 to 8; the released code).
    Each adapter name has a router [E, D], W_down [E, R, D] and W_up [E, D, R]. Several active adapters add up.
    """

    adapter_layer_names = ("pesc_router", "pesc_down", "pesc_up")
    other_param_names = ("pesc_config",)

    # Of BaseTunerLayer, for which there are no types.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, hidden_size: int, recorder: Recorder) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size = hidden_size
        self.recorder = recorder
        self.pesc_router = nn.ParameterDict()
        self.pesc_down = nn.ParameterDict()
        self.pesc_up = nn.ParameterDict()
        self.pesc_config: dict[str, PescConfig] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, name: str, config: PescConfig) -> None:
        """Add an adapter in the type of the FFN: W_up zero, so that it does nothing yet, and the others as nn.Linear.

        That is kaiming_uniform with a = sqrt(5) on each matrix, which is uniform on +-1 / sqrt(D).
        """
        dtype, device = _floating(self.get_base_layer())
        experts, hidden, width = config.num_experts, self.hidden_size, config.adapter_dim

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1) * hidden**-0.5)

        self.pesc_config[name] = config
        self.pesc_router[name] = uniform(experts, hidden)
        self.pesc_down[name] = uniform(experts, width, hidden)
        self.pesc_up[name] = nn.Parameter(torch.zeros(experts, hidden, width, dtype=dtype, device=device))
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The FFN's output and what its active adapters add to it, in the type of that output."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.pesc_router]
        result = y
        for name in names:
            result = result + self._added(name, x, y)
        return result.to(y.dtype)

    def _added(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        config, router, kind = self.pesc_config[name], self.pesc_router[name], y.device.type
        down, up = self.pesc_down[name], self.pesc_up[name]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else down.dtype
        x_TD, y_TD = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        with torch.autocast(kind, enabled=False):  # a router in 16 bits chooses other experts than it was trained to
            logits_TE = functional.linear(x_TD.to(router.dtype), router)
            index_TK, _ = route(logits_TE.detach(), config.top_k)
            # Not a renormalised softmax: with one choice its gradient is rounding noise, which Adam makes steps of.
            weight_TK = config.scale * logits_TE.gather(-1, index_TK).softmax(-1)
            self.recorder.record(Routing(name, logits_TE, index_TK, router.requires_grad))
            read_TD = functional.dropout(y_TD.to(dtype), config.adapter_dropout, self.training)
            added_TD = expert_mlp(read_TD, down.to(dtype), up.to(dtype), index_TK, weight_TK, activation=GELU)
        return added_TD.view(y.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: no weight can hold adapters that tokens choose.

        Raises:
            InputError: always.
        """
        raise InputError(*NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def __repr__(self) -> str:
        return "pesc." + super().__repr__()


def hidden_size_of(name: str, module: nn.Module) -> int:
    """The width that an FFN reads and writes, from its first and last linear layer, quantised ones too.

    Raises:
        InputError: the module is no FFN: fewer than two linear layers, or an output not as wide as its input.
    """
    linear: list[Any] = [part for part in module.modules() if hasattr(part, "in_features")]
    if len(linear) < 2 or linear[0].in_features != linear[-1].out_features:
        raise InputError(
            f"Module {name} ({type(module).__name__}) is not an FFN.",
            "PESC adapters stand behind a whole FFN, which reads and writes the hidden state.",
            "Name the FFN modules in target_modules, such as ['mlp'].",
        )
    return int(linear[0].in_features)


def _floating(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Type and device of a module's first weight; the type it computes in where that is quantised."""
    weight = next(module.parameters())
    if weight.is_floating_point():
        return weight.dtype, weight.device
    stated = (getattr(part, "compute_dtype", None) for part in module.modules())
    return next(filter(None, stated), torch.float32), weight.device
