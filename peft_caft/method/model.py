"""`CAFTModel`: LoRA's tuner with auxiliary heads and their loss."""

import copy
import os
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import PeftType
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.config import fingerprint
from ..heads.sharding import whole
from .config import CAFTConfig
from .configured_heads import add_lora, make_heads
from .objective import HEADS_PREFIX, AuxiliaryObjective, heads_are_never_missing, named_arguments, run
from .registration import register


class CAFTModel(AuxiliaryObjective, LoraModel):
    """Concept-aware fine-tuning (CAFT, arXiv 2506.07833) of a causal language model with LoRA.

    ``get_peft_model(model, CAFTConfig(...))`` makes it. In training mode, with labels and
    gradients, its forward adds

        beta * gamma(s) * sum_{k=2..n} alpha^(k-1) * CE_k

    to the model's own loss CE_1. All CE_k are divided by the number of next-token targets in the
    batch, or by ``num_items_in_batch`` if the trainer passes it. In evaluation, with the adapter
    disabled, or after ``merge_and_unload``, it is a plain LoRA model.

    Each adapter has its own heads in this tuner; they are neither in the base model nor in the
    saved adapter. They use the base model's own final norm and unembedding, even where an adapter
    changes these (``modules_to_save``): a trained copy of the lm_head gets no auxiliary gradient.

    Attributes:
        auxiliary_heads: adapter name -> `AuxiliaryHeads`, without adapters loaded for inference.
        gamma: weight of the auxiliary loss at the current step; fp32 scalar buffer, not saved.

    Example:
        >>> model = get_peft_model(base, CAFTConfig(aux_loss_schedule="constant")).train()
        >>> model(input_ids=input_ids, labels=input_ids).loss.backward()  # a bare loop
    """

    # So inject_adapter_in_model (peft 0.21) refuses CAFT; it would drop the tuner with the heads.
    uses_shared_state = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._begin_objective()
        # Heads, and what told the lm_head then; in a list, since a module would be registered.
        self._new_heads: list[tuple[AuxiliaryHeads, list[float] | None]] = []
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_post_hook(heads_are_never_missing)

    # Heads are made with their adapter, and switched, frozen, cast and deleted with it.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the LoRA layers of an adapter, and heads unless it is loaded for inference."""
        config = self.peft_config[adapter_name]
        # peft.utils.transformers_weight_conversion (peft 0.21) converts mixtures of experts for
        # type LORA alone, in convert_peft_config_for_transformers.
        config.peft_type = PeftType.LORA
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._new_heads.clear()
            raise
        finally:
            config.peft_type = PeftType.CAFT
        assert self._backbone is not None
        if "gamma" not in self._buffers:
            self._register_gamma(self._backbone.lm_head.weight.device)
            self.auxiliary_heads = nn.ModuleDict()
        if self._new_heads:
            heads, lm_head = self._new_heads.pop()
            if fingerprint(whole(self._backbone.lm_head.weight)) != lm_head:
                raise ValueError(
                    f"init_lora_weights: got {config.init_lora_weights!r} for the lm_head, whose own weight it changes, while the heads "
                    "use the base model's. Leave lm_head out of target_modules, or set init_lora_weights=True."
                )
            if config.train_heads == "lora":
                add_lora(heads, config, adapter_name)
            self.auxiliary_heads[adapter_name] = heads
            self._warn_of_changed_parts()
        self._set_heads_trainable()

    def _prepare_model(self, peft_config: CAFTConfig, model: nn.Module) -> None:
        """Make the heads: after PEFT has replicated layers, and before it changes any."""
        super()._prepare_model(peft_config, model)
        self._backbone = self._backbone or Backbone.of(model)
        if not peft_config.inference_mode:
            heads = make_heads(peft_config, model)
            self._new_heads.append((heads, fingerprint(whole(self._backbone.lm_head.weight))))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_heads_trainable(inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._set_heads_trainable()
        if not requires_grad:
            for name in set(names) & set(self.auxiliary_heads):
                self.auxiliary_heads[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.auxiliary_heads:
            del self.auxiliary_heads[adapter_name]
        self._set_heads_trainable()  # if it was active, PEFT has activated another one

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        for module in self.auxiliary_heads.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(enabled)
        self._set_heads_trainable(inference_mode=not enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.auxiliary_heads:
            heads = self.auxiliary_heads[adapter_name]
            if self.peft_config[adapter_name].train_heads == "full":
                heads.float()
            cast_adapter_dtype(heads, adapter_name, autocast_adapter_dtype)

    def _set_heads_trainable(self, inference_mode: bool = False) -> None:
        if "auxiliary_heads" not in self._modules:
            return  # called by BaseTuner before the first heads exist
        for name, heads in self.auxiliary_heads.items():
            active = name in self.active_adapters and not inference_mode
            mode = self.peft_config[name].train_heads if active else "frozen"
            for parameter_name, parameter in heads.named_parameters():
                is_lora = self.prefix in parameter_name
                parameter.requires_grad_(mode == "full" or (mode == "lora" and is_lora))
            heads.train(self.training)

    # The loss.

    def _active_config(self) -> CAFTConfig:
        active = self.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"active adapters: got {active}, expected exactly one while training with CAFT. Choose it with "
                "set_adapter(name), or wrap the step in auxiliary_loss_enabled(False)."
            )
        return self.peft_config[active[0]]

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward; in training with ``labels`` the auxiliary loss is in its loss.

        Then the output holds no logits (their use is an error), unless the call asks for them, for
        instance with ``logits_to_keep=0``, transformers' value for all tokens. If TRL's SFTTrainer
        asks for log-probabilities, they carry the auxiliary gradient (`log_probs_pass`).

        Args:
            args, kwargs: arguments of the base model; ``labels``: int64 ``(batch, tokens)``.

        Returns:
            the base model's output; the loss is an fp32 scalar in nats, 0 without any target.

        Raises:
            ValueError: if the adapter was loaded for inference, the schedule does not know the step
                of the run, more than one adapter is active, or rows are split over processes.
        """
        training_pass = self._training_pass(named_arguments(self.model, args, kwargs))
        return self.model(*args, **kwargs) if training_pass is None else run(training_pass, self.model)

    def _wants_auxiliary_loss(self) -> bool:
        return (
            super()._wants_auxiliary_loss()
            and bool(self.active_adapters)
            and not any(m.disable_adapters for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        )

    def heads_for_training(self) -> AuxiliaryHeads:
        name = self.active_adapters[0]
        if name not in self.auxiliary_heads:
            raise ValueError(
                f"adapter {name!r}: loaded for inference (inference_mode={self.peft_config[name].inference_mode}), so it has no "
                "heads, expected one made for training. Load it with `peft_caft.load_adapter(model, folder, "
                "is_trainable=True)`, or call model.eval() if you only want the next-token loss."
            )
        return self.auxiliary_heads[name]

    # Saving: the heads are an artifact of their own.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, Tensor]:
        without_heads = {key: value for key, value in state_dict.items() if HEADS_PREFIX not in key}
        return super()._get_adapter_state_dict(model, config, adapter_name, without_heads, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict
    ) -> dict[str, Tensor]:
        # set_peft_model_state_dict (peft 0.21) makes this conversion for type LORA alone.
        state_dict = convert_peft_adapter_state_dict_for_transformers(
            model, config.to_lora_config(), state_dict, adapter_name
        )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path_initial_model_for_weight_conversion: str, *args: Any
    ) -> dict[str, Tensor]:
        # PEFT would read the initial adapter as LORA and refuse to mix the two types. Into an
        # adapter that is there already, it loads weights whatever the type on disk.
        initial = copy.deepcopy(peft_config)
        initial.inference_mode = True
        peft_model.add_adapter(os.path.basename(path_initial_model_for_weight_conversion), initial)
        return super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, *args
        )


register(CAFTConfig, CAFTModel)  # so import CAFTConfig from this module wherever an adapter is made
