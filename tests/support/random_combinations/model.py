"""A `Case` as a model, with adapters or without, that is far from its trivial initial values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from peft_caft import AuxiliaryHeads, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.method.callback import objective_of

from ...reference import Parts
from ..architectures import ARCHITECTURES, MIXTURE
from .batches import dtype_of_base
from .case import Case

# Layers and final norm of those architectures that call them otherwise than Llama does.
NAMES = {
    "Phi": ("model.layers", "model.final_layernorm"),
    "GPT-2": ("transformer.h", "transformer.ln_f"),
    "GPT-NeoX": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "OPT": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "BLOOM": ("transformer.h", "transformer.ln_f"),
    "Falcon": ("transformer.h", "transformer.ln_f"),
    "Mamba": ("backbone.layers", "backbone.norm_f"),
    "Mamba 2": ("backbone.layers", "backbone.norm_f"),
    "LLaVA (the text)": ("model.language_model.layers", "model.language_model.norm"),
}
LLAMA_NAMES = ("model.layers", "model.norm")
ROUTER_WEIGHT = 0.5


class CombinedModel:
    """The model of a case.

    Attributes:
        model: what is trained.
        base: the transformers model in it.
        objective: the package's part of it.
        parts, final_norm: what the reference is told of the base and of the heads.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        spoiled = dict([case.spoiled]) if case.spoiled else {}
        base = _base_model(case)
        layers, norm = NAMES.get(case.architecture, LLAMA_NAMES)
        self.parts = Parts(layers, base.get_submodule(norm), base.lm_head, _after_logits(case.architecture))
        if case.loss == "sft":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        self.final_norm = (case.head_input == "last_layer_input") != (case.head_files == "other norm")
        fields, self.heads_in_files = _objective_fields(case), []
        if case.head_files:
            self.heads_in_files = _heads_in_files(case, base, folder / f"heads-{case.seed}")
            fields["heads"] = str(folder / f"heads-{case.seed}")
        base.to(dtype_of_base(case))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(not _is_frozen(base, name, parameter, case.frozen_base))
        if case.checkpointing and "later" not in case.checkpointing:
            _checkpoint(base, case)
        own_lm_head = base.lm_head.weight.detach().clone()
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            if case.method == "full":
                fields["freeze_unembedding"] = case.freeze_unembedding
                self.model = prepare_full_fine_tuning(
                    base, FullFineTuningConfig(**fields | _own(spoiled, FullFineTuningConfig))
                )
            else:
                if "layers_to_transform" in spoiled:  # which names of modules go with, but no pattern
                    spoiled["target_modules"] = "all-linear"
                self.model = self._peft_model(base, {**fields, **case.peft} | _own(spoiled, CAFTConfig))
        if case.checkpointing and "later" in case.checkpointing:
            _checkpoint(base, case)
        self.model.train()
        assert torch.equal(self.parts.lm_head.weight, own_lm_head), "heads use another lm_head than the base model's"
        self.base = base
        self.objective = objective_of(self.model)
        self._require_trained_parts(spoiled)
        if "inference_mode" not in spoiled:
            self.add_noise()
        unfrozen = {
            "": [],
            "final norm": self.parts.norm.named_parameters(),
            "lm_head": self.parts.lm_head.named_parameters(),
            "last layer": base.get_submodule(layers)[-1].named_parameters(),
        }
        for name, parameter in unfrozen[case.unfrozen_base]:
            parameter.requires_grad_(parameter.requires_grad or "lora_" not in name)

    def _require_trained_parts(self, spoiled: dict[str, Any]) -> None:
        """What trains is what the configuration says, and heads are those of the files."""
        case = self.case
        if "inference_mode" in spoiled:
            return
        for name, parameter in self.trained_heads.named_parameters():
            trained = case.train_heads == "full" or (case.train_heads == "lora" and "lora_" in name)
            assert parameter.requires_grad == trained, name
        in_files = [p for head in self.heads_in_files for p in head.parameters()]
        own = [p for head in self.heads for n, p in head.named_parameters() if "lora_" not in n]
        rounded = [p.to(dtype_of_base(case)) for p in in_files]
        assert not in_files or all(torch.equal(p, q.to(p.dtype)) for p, q in zip(own, rounded, strict=True))
        if case.method == "full":
            lm_head = list(self.parts.lm_head.parameters())
            for name, parameter in self.base.named_parameters():
                frozen = _is_frozen(self.base, name, parameter, case.frozen_base)
                frozen |= case.freeze_unembedding and any(parameter is own for own in lm_head)
                assert "caft" in name or parameter.requires_grad != frozen, name

    def _peft_model(self, base: PreTrainedModel, fields: dict[str, Any]) -> PeftModel:
        case = self.case
        fp32_adapters = {"autocast_adapter_dtype": case.precision != "bf16"}
        model = get_peft_model(base, CAFTConfig(**fields), **fp32_adapters)
        if case.adapters != "one" or (case.spoiled and case.spoiled[0] == "two adapters"):
            other = {"head_type": "residual", "num_auxiliary_heads": 1, "aux_loss_weight": 9.0, "r": 3}
            names = ["second", "default"] if case.adapters == "second inactive" else ["default", "second"]
            if names[0] == "second":
                model.add_adapter(
                    "second", CAFTConfig(target_modules=case.peft["target_modules"], **other), **fp32_adapters
                )
            else:
                model.add_adapter("second", CAFTConfig(**fields), **fp32_adapters)
                model.set_adapter("second")
            if case.spoiled and case.spoiled[0] == "two adapters":
                model.base_model.set_adapter(["default", "second"])
        return model

    def add_noise(self) -> None:
        """To what is trained and to heads, so that nothing is zero or equal to its neighbour."""
        generator = torch.Generator().manual_seed(self.case.seed + 1)
        for name, parameter in self.model.named_parameters():
            heads = "auxiliary_heads" in name
            if (heads and not self.case.head_files) or (parameter.requires_grad and self.case.method == "lora"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (0.1 if "lora_" in name or heads else 0.03) * noise.to(parameter.dtype)

    @property
    def trained_heads(self) -> AuxiliaryHeads:
        """Those of the adapter that trains."""
        if self.case.method == "full":
            return self.objective.auxiliary_heads
        return self.objective.auxiliary_heads["second" if self.case.adapters == "second active" else "default"]

    @property
    def heads(self) -> list[nn.Sequential]:
        return list(self.trained_heads.heads)


def _base_model(case: Case) -> PreTrainedModel:
    config = ARCHITECTURES[case.architecture]()
    text = config.get_text_config()
    text.num_hidden_layers = case.layers
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[-case.layers :]
    if case.tied is not None:
        config.tie_word_embeddings = text.tie_word_embeddings = case.tied
    if case.router_loss:
        text.output_router_logits, text.router_aux_loss_coef = True, ROUTER_WEIGHT
    if case.precision != "fp32" and hasattr(text, "num_experts_per_tok"):
        # The choice of an expert may hang on a rounding error.
        text.num_experts_per_tok = MIXTURE["num_local_experts"]
        text.topk_group = vars(text).get("n_group")
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        model = auto.from_config(config, attn_implementation=case.attention)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def _after_logits(architecture: str) -> Callable[[Tensor], Tensor]:
    match architecture:
        case "Gemma 2":
            return lambda logits: 3.0 * torch.tanh(logits / 3.0)
        case "Cohere":
            return lambda logits: logits * 0.3
        case "Granite":
            return lambda logits: logits / 3.0
    return lambda logits: logits


def _objective_fields(case: Case) -> dict[str, Any]:
    told = case.told == "total_steps"
    return {
        "num_auxiliary_heads": case.heads,
        "head_type": case.head_type,
        "head_input": case.head_input,
        "head_num_layers": case.head_layers,
        "train_heads": case.train_heads,
        "aux_loss_weight": case.beta,
        "aux_loss_decay": case.alpha,
        "aux_loss_schedule": case.schedule,
        "aux_token_fraction": case.fraction,
        "total_steps": case.total_steps if told else None,
    }


def _own(spoiled: dict[str, Any], config: type) -> dict[str, Any]:
    return {name: value for name, value in spoiled.items() if name in config.__dataclass_fields__}


def _heads_in_files(case: Case, base: PreTrainedModel, folder: Path) -> list[nn.Module]:
    """Writes heads, and returns those that the case takes."""
    more = 2 if case.head_files == "more heads" else 0
    heads = AuxiliaryHeads.from_base_model(
        base, case.heads + more, case.head_type, case.head_input, case.head_layers, case.head_files == "with bias"
    )
    if case.head_files == "other norm":
        heads.config.final_norm = not heads.config.final_norm
    generator = torch.Generator().manual_seed(case.seed + 2)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    heads.save_pretrained(folder)
    return list(heads.heads)[: case.heads]


def _is_frozen(base: PreTrainedModel, name: str, parameter: Tensor, what: str) -> bool:
    """Whether it is one of the parameters that the user of a case has frozen."""
    if what == "embeddings":
        return parameter is base.get_input_embeddings().weight
    return (what == "norms" and ("norm" in name or "ln_" in name)) or (what == "biases" and name.endswith("bias"))


def _checkpoint(base: PreTrainedModel, case: Case) -> None:
    reentrant = case.checkpointing.startswith("reentrant")
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # else no gradient goes through layers whose parameters are frozen
        base.enable_input_require_grads()
