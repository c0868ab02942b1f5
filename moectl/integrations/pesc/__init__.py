"""PESC, adapters as experts behind a shared frozen FFN (arXiv 2401.02731), as a method of PEFT.

    import moectl.integrations.pesc
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), PescConfig(task_type="CAUSAL_LM"))

Importing this module once makes `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained` and the rest of PEFT
know the method "PESC". Its adapter experts run as one grouped call of `moe_kernels.expert_mlp`.
"""

from __future__ import annotations

from moectl.integrations.pesc.registration import add_peft_type

add_peft_type("PESC")

from peft.utils import register_peft_method  # noqa: E402

from moectl.integrations.pesc.config import PescConfig  # noqa: E402
from moectl.integrations.pesc.layer import PescLayer  # noqa: E402
from moectl.integrations.pesc.model import PescModel  # noqa: E402

__all__ = ["PescConfig", "PescLayer", "PescModel"]

register_peft_method(name="pesc", config_cls=PescConfig, model_cls=PescModel)
