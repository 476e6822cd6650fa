"""Which trainer runs a training step, and whether it trains on the next-token loss.

The auxiliary loss is defined beside that loss. TRL's other trainers (GRPO, DPO, KTO, ...) call the
model with labels too, and then weigh what it returns in their own way.
"""

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def running_trainer() -> "Trainer | None":
    """The Trainer that trains in this thread; None in a loop of one's own.

    Neither the model nor a callback is told, so that the calling functions are searched. Before
    Python 3.13 `f_locals` is a copy that keeps its values alive, so that few of them are looked at.
    """
    module = sys.modules.get("transformers.trainer")  # whose import takes seconds
    frame: FrameType | None = sys._getframe(1)
    while module is not None and frame is not None:
        if frame.f_code.co_name in ("train", "training_step") and isinstance(
            frame.f_locals.get("self"), module.Trainer
        ):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def trains_on_next_tokens(trainer: "Trainer") -> bool:
    """Whether it is TRL's SFTTrainer, or no trainer of TRL but transformers' Trainer."""
    of_trl = [kind for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] == "trl"]
    return not of_trl or of_trl[0].__name__ == "SFTTrainer"


def require_usual_loss(args: Any) -> None:
    """Raise a ValueError for a loss of SFTTrainer beside which the auxiliary one is undefined."""
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        raise ValueError(
            f"loss_type: got {loss_type!r}, expected 'nll'. DFT weighs tokens by their probability, and the auxiliary loss is "
            "defined beside the next-token loss. Set SFTConfig(loss_type='nll'), or train LoRA."
        )
