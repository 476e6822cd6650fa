"""Full fine-tuning with the objective of CAFT: all parameters train, and the model stays plain."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..basics.checks import require_choice
from ..basics.settings import OBJECTIVE, setting
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from .configured_heads import make_heads
from .objective import AuxiliaryObjective, TrainingPass, begin, finish, heads_are_never_missing, named_arguments
from .objective_config import ObjectiveConfig

NAME = "caft_objective"


@dataclass
class FullFineTuningConfig(ObjectiveConfig):
    """Configuration of full fine-tuning with the objective of CAFT (arXiv 2506.07833).

    `CAFTConfig` explains the loss. ``train_heads`` is ``"frozen"`` or ``"full"``.

    Raises:
        ValueError: if a field is out of range; the message names field, value and expected range.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("organisation/base")
        >>> prepare_full_fine_tuning(model, FullFineTuningConfig(heads="organisation/heads"))
        >>> Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()]).train()
        >>> model.save_pretrained("model")  # a plain transformers model
    """

    freeze_unembedding: bool = setting(
        "Keep the lm_head as it is, which the heads share; with tied embeddings the input embedding too. "
        "Otherwise it learns from all losses.",
        False,
        group=OBJECTIVE,
    )

    def __post_init__(self) -> None:
        require_choice("train_heads", self.train_heads, ("frozen", "full"))
        self.require_valid_objective()


class FullFineTuning(AuxiliaryObjective, nn.Module):
    """The objective that `prepare_full_fine_tuning` attaches to a model.

    It is a submodule of the model, works by hooks on its forward, and has no part in its state
    dict: class, weights and ``save_pretrained`` of the model stay plain. `CAFTModel.forward`
    explains when loss and outputs differ from the model's own.

    Attributes:
        config: the given configuration, with what the heads are.
        auxiliary_heads: the heads.
    """

    def __init__(self, model: PreTrainedModel, config: FullFineTuningConfig) -> None:
        self._begin_objective()
        super().__init__()
        self._backbone = Backbone.of(model)
        self.config = config
        self.auxiliary_heads = make_heads(config, model)
        self.auxiliary_heads.requires_grad_(config.train_heads == "full")
        lm_head = self._backbone.lm_head
        if config.freeze_unembedding:
            lm_head.requires_grad_(False)
        self._register_gamma(lm_head.weight.device)
        self.register_load_state_dict_post_hook(heads_are_never_missing)
        self._pass: TrainingPass | None = None
        self._precision: dict[str, Any] = {}
        # Hooks, not another forward: accelerate and TRL wrap or replace the model's forward later.
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            self._backbone.trunk.register_forward_pre_hook(self._note_precision),
        ]
        self.train(model.training)

    def detach_from(self, model: nn.Module) -> None:
        """Take the objective and its hooks off ``model``."""
        for hook in self._hooks:
            hook.remove()
        model._keys_to_ignore_on_save -= self.keys_in(model)
        delattr(model, NAME)

    def keys_in(self, model: nn.Module) -> set[str]:
        """Names of this module's parameters in ``model``."""
        return {name for name, _ in model.named_parameters() if name.startswith(f"{NAME}.")}

    def _active_config(self) -> FullFineTuningConfig:
        return self.config

    def heads_for_training(self) -> AuxiliaryHeads:
        return self.auxiliary_heads

    def _note_precision(self, trunk: nn.Module, args: tuple) -> None:
        # accelerate switches autocast on inside of the model's hooks; the losses need the same.
        device_type = self.gamma.device.type
        self._precision = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }

    @torch.compiler.disable(recursive=False)
    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self._pass is not None:  # torch calls no hook after KeyboardInterrupt
            self._pass.close()
        self._pass = self._training_pass(named_arguments(model, args, kwargs))
        if self._pass is None:
            return args, kwargs
        # The model's switch has reached the heads too, whose layers are not run as a whole.
        for layer in self.auxiliary_heads.modules():
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False
        return (), begin(self._pass)

    @torch.compiler.disable(recursive=False)
    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        training_pass, self._pass = self._pass, None
        if training_pass is None:
            return outputs
        if outputs is None:  # the model raised an error
            return training_pass.close()
        with torch.autocast(**self._precision):
            return finish(training_pass, outputs, model.forward)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Nothing, so that the model's state dict is the plain one."""
        return kwargs.get("destination", {})


def prepare_full_fine_tuning(model: PreTrainedModel, config: FullFineTuningConfig) -> PreTrainedModel:
    """Attach the objective of CAFT to a causal language model whose parameters all train.

    ``Trainer`` or TRL's ``SFTTrainer`` with `CAFTCallback` trains the model; its checkpoints and
    ``save_pretrained`` are those of the plain model. A bare loop tells the schedule with
    ``model.caft_objective.set_training_progress(step, total_steps)``, and
    ``model.caft_objective.detach_from(model)`` undoes it. `FullFineTuningConfig` has an example.

    Args:
        model: causal language model of transformers, in fp32 or bf16 on any device.
        config: configuration of the objective.

    Returns:
        the same model.

    Raises:
        TypeError: if the model is not a decoder-only causal language model, or has adapters.
        ValueError: if it has the objective already, or parameters that cannot be trained.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError(
            f"model: got {type(model).__name__} with adapters, expected a plain transformers model. Use get_peft_model(model, "
            "CAFTConfig(...)) to train adapters, or merge_and_unload() them first."
        )
    if hasattr(model, NAME):
        raise ValueError(f"model: has a {NAME} already, expected none. Call model.{NAME}.detach_from(model) first.")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "model: got a quantised one, whose weights cannot be trained. Load it unquantised, or train adapters on it with "
            "get_peft_model(model, CAFTConfig(...))."
        )
    objective = FullFineTuning(model, config)
    model.add_module(NAME, objective)
    # DeepSpeed's ZeRO-3 collects parameters without asking for a state dict.
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *objective.keys_in(model)}
    return model
