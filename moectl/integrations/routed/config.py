"""The config of a research checkpoint: a file names the router beside the base config; in memory it is the base's.

So nothing that reads config.json takes the model for one of the base family, and everything that asks the loaded config
for its sizes finds them.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moectl.families.components import ROUTED
from moectl.integrations.routed.model import routed_class


class RoutedConfig(PreTrainedConfig):
    """What `AutoConfig` finds under the model type; reading one gives a config of the base family, with a `router`."""

    model_type = ROUTED

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base family's config with `router`: {"name", "options"}.

        Raises:
            KeyError: config.json lacks one of the two, or transformers does not know the base family.
        """
        base = dict(config_dict["base_config"])
        kind = config_class(base.pop("model_type"))
        return kind.from_dict({**base, "router": config_dict["router"]}, **kwargs)


@cache
def config_class(base_type: str) -> Any:
    """The config class of a base family with a `router`, known to transformers together with its model classes.

    Raises:
        KeyError: transformers does not know the family.
    """
    base = CONFIG_MAPPING[base_type]

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        written = json.loads(super(kind, self).to_json_string(use_diff))
        router = written.pop("router")
        document = {"model_type": ROUTED, "router": router, "base_config": written}
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    kind: Any = type(f"Routed{base.__name__}", (base,), {"__module__": __name__, "to_json_string": to_json_string})
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto._model_mapping.get(base, None)
        if model is not None:
            auto.register(kind, routed_class(model, kind))
    return kind


def with_router(config: PreTrainedConfig, name: str, options: dict[str, Any]) -> Any:
    """A config of the base family with the router of that name and those options, all of them."""
    kind = config_class(config.model_type)
    return kind.from_dict({**config.to_dict(), "router": {"name": name, "options": options}})
