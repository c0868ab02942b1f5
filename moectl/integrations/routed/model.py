"""A family's model class whose MoE layers route by another router; everything else is transformers' own."""

from __future__ import annotations

from functools import cache
from typing import Any

from moectl.integrations.routed.install import install


@cache
def routed_class(base: Any, config_class: Any) -> Any:
    """The subclass of a model class that has the router which its config names.

    It keeps the class's name and module: by these transformers finds how the family's weights are named on disk, and
    that its experts take an implementation.
    """

    def __init__(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        super(kind, self).__init__(config, *arguments, **named)
        install(self, config.router)
        # Routers are in float32 whatever the rest is in, as their state and what they compute are.
        self._keep_in_fp32_modules_strict = {*self._keep_in_fp32_modules_strict, "router"}

    body = {"__module__": base.__module__, "__init__": __init__, "config_class": config_class}
    kind: Any = type(base.__name__, (base,), body)
    return kind
