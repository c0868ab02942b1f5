"""What a PESC adapter is made of: the contents of its adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PescConfig(PeftConfig):
    """The configuration of a PESC adapter (arXiv 2401.02731, section 2.2).

    Args:
        num_experts: adapters behind each FFN.
        top_k: adapters each token is sent to.
        adapter_dim: width of an adapter's bottleneck; 512 is the paper's (its released script says 64).
        scale: factor s on the adapters' output; the released code has 1 in training and 0.25 in merging.
        adapter_dropout: dropout on the FFN's output where the adapters read it; the released code has 0.1.
        aux_loss_coef: weight of the load-balancing loss that is added to the loss in training; 0 for none.
        lora_r: rank of LoRA on linear layers, trained and saved with the adapters; 0 for none; 64 in the paper.
        lora_alpha, lora_dropout: as in `LoraConfig`.
        lora_target_modules: the linear layers that get LoRA, as PEFT matches them.
        target_modules: names of the FFN modules, as PEFT matches them; the model family's own when left out.
        exclude_modules: names of modules to leave alone.
        layers_to_transform, layers_pattern: the layers to adapt, all when left out.
        modules_to_save: other modules to train and save whole.

    Raises:
        ValueError: a value out of its range.
    """

    num_experts: int = field(default=8, metadata=_help("Adapters behind each FFN."))
    top_k: int = field(default=2, metadata=_help("Adapters each token is sent to."))
    adapter_dim: int = field(default=512, metadata=_help("Width of an adapter's bottleneck."))
    scale: float = field(default=1.0, metadata=_help("Factor on the adapters' output."))
    adapter_dropout: float = field(default=0.0, metadata=_help("Dropout where the adapters read the FFN's output."))
    aux_loss_coef: float = field(default=0.01, metadata=_help("Weight of the load-balancing loss in training."))
    lora_r: int = field(default=0, metadata=_help("Rank of LoRA on linear layers; 0 for none."))
    lora_alpha: int = field(default=16, metadata=_help("LoRA's scale times its rank."))
    lora_dropout: float = field(default=0.0, metadata=_help("Dropout where LoRA reads."))
    lora_target_modules: list[str] | set[str] | str | None = field(
        default="all-linear", metadata=_help("The linear layers that get LoRA.")
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("Names of the FFN modules; the model family's own when left out.")
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("Names of modules to leave alone.")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("Layers to adapt; all when left out.")
    )
    layers_pattern: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("Name of the list of layers, where it is not clear.")
    )
    modules_to_save: list[str] | None = field(default=None, metadata=_help("Other modules to train and save whole."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PESC")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.lora_target_modules, list):
            self.lora_target_modules = set(self.lora_target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} of {self.num_experts} experts is impossible")
        if self.adapter_dim < 1:
            raise ValueError(f"adapter_dim {self.adapter_dim} is below 1")
        if not 0 <= self.adapter_dropout < 1:
            raise ValueError(f"adapter_dropout {self.adapter_dropout} is not in [0, 1)")
        if self.lora_r < 0:
            raise ValueError(f"lora_r {self.lora_r} is below 0")
        if self.aux_loss_coef < 0:
            raise ValueError(f"aux_loss_coef {self.aux_loss_coef} is below 0")
