"""Settings of ``peft-caft plan``. It imports no torch."""

from dataclasses import dataclass
from typing import Literal

from ..basics.checks import require_choices, require_counts, require_token_fraction
from ..basics.settings import ADAPTER, DATA, same_setting, setting
from ..method.objective_config import ObjectiveConfig


@dataclass(frozen=True)
class PlanSettings:
    """What to plan; each field is an option of ``peft-caft plan``.

    Raises:
        ValueError: if a field is out of range.
    """

    model: str = setting("Base model: folder, config.json or Hub id. No weights are read.", group=DATA)
    tokens: int = setting("Length of a row in tokens.", 512, group=DATA)
    batch_size: int = setting("Rows on each GPU at a time (per_device_train_batch_size).", 8, group=DATA)
    supervised: float = setting("s: share of the tokens that have a label.", 0.5, group=DATA)
    r: int = setting("LoRA rank.", 8, group=ADAPTER)
    target_modules: str = setting("'all-linear', or module names with commas.", "all-linear", group=ADAPTER)
    num_auxiliary_heads: int = same_setting(
        ObjectiveConfig, "num_auxiliary_heads", help="Number of auxiliary heads, n - 1."
    )
    head_num_layers: int = same_setting(ObjectiveConfig, "head_num_layers", help="Blocks or layers per head.")
    aux_token_fraction: float = same_setting(
        ObjectiveConfig,
        "aux_token_fraction",
        help="p: share of the supervised positions that the heads see. Operations are shown for 1 and for p, or 0.25.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "Precision of the base model and the heads.", "bfloat16", group=DATA
    )
    autocast: bool = setting("Plan for bfloat16 autocast, as with --bf16 true in training.", False)
    gpus: int = setting("Number of GPUs: above 1 for DDP, ZeRO-2, FSDP and ZeRO-3, with what each sends in a step.", 1)
    gpu_memory: float | None = setting("Memory of each GPU in GiB, such as 24 or 80: marks what fits.", None)
    attention: Literal["sdpa", "eager"] | None = setting(
        "Attention implementation. [default: what transformers takes]", None
    )
    device: Literal["cuda", "cpu"] = setting("What to plan for: a GPU computes more logits at a time.", "cuda")

    def __post_init__(self) -> None:
        require_choices(self)
        require_counts(self, "batch_size", "num_auxiliary_heads", "head_num_layers", "r", "gpus")
        least = self.num_auxiliary_heads + 2
        if self.tokens < least:
            raise ValueError(
                f"tokens: got {self.tokens}, expected at least {least}, since the last of {self.num_auxiliary_heads} auxiliary "
                f"heads predicts {self.num_auxiliary_heads + 1} tokens ahead."
            )
        if not 1 <= round(self.supervised * self.tokens) <= self.tokens:
            raise ValueError(
                f"supervised (s): got {self.supervised}, expected 0 < s <= 1, the share of tokens with a label, and "
                f"at least one of the {self.tokens} tokens."
            )
        require_token_fraction(self.aux_token_fraction)
        if self.gpu_memory is not None and not self.gpu_memory > 0:
            raise ValueError(f"gpu_memory: got {self.gpu_memory}, expected GiB above 0.")
