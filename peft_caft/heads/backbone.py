"""The parts of a causal language model that heads use: layers, final norm and unembedding.

They are found by structure, not by the name of an architecture. Before their first use, `probe`
compares what they compute with the model's own output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .probe import Probe, probe
from .sharding import parameter_of, whole, whole_shape
from .unembedding import Unembedding
from .watched_pass import Captured, LayerStack


def beneath_adapters(module: nn.Module) -> nn.Module:
    """The base model's own module inside the wrappers that PEFT may have put around it."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model that ``model`` is or holds; a TypeError if there is none."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, BaseTuner):
        model = model.model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel with a language-modelling "
            "head, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    return model


@dataclass(kw_only=True)
class Backbone(LayerStack):
    """References to the parts of one base model, which are found again when they are replaced.

    Attributes:
        model: the transformers model.
        lm_head: linear layer with a floating-point weight.
        shift_verified: whether it was checked that the model shifts its labels itself.
        logits_needed: whether the model has no loss if it computes no logits; None if unknown.
    """

    model: PreTrainedModel
    lm_head: nn.Module
    shift_verified: bool = False
    logits_needed: bool | None = None
    _probe: Probe | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Backbone:
        """Find the parts in a base model, with or without adapters.

        Raises:
            TypeError: if ``model`` is not a decoder-only causal language model of transformers.
            ValueError: if some of its weights are not on the devices of this process.
        """
        base = base_model_of(model)
        _require_weights_at_hand(base)
        name = type(base).__name__
        advice = "CAFT needs a decoder-only causal language model, such as AutoModelForCausalLM returns."
        if getattr(base.config, "is_encoder_decoder", False):
            raise TypeError(f"model: got {name}, an encoder-decoder. {advice}")
        lm_head = base.get_output_embeddings()
        if lm_head is None or getattr(base, "loss_type", None) == "ForMaskedLM":
            raise TypeError(f"model: got {name}, which has no causal language-modelling head. {advice}")
        lm_head = beneath_adapters(lm_head)
        if not isinstance(getattr(lm_head, "weight", None), Tensor) or not lm_head.weight.is_floating_point():
            raise TypeError(
                f"lm_head: got {type(lm_head).__name__} in {name}, expected a linear layer with a floating-point weight. "
                "Load the model with the unembedding unquantised (llm_int8_skip_modules=['lm_head'] or alike)."
            )
        trunk, layers = _trunk_and_layers(base)
        if layers is None:
            raise TypeError(f"model: got {name}, in which no list of layers was found. {advice}")
        return cls(
            model=base,
            trunk=trunk,
            layers=layers,
            lm_head=lm_head,
        )

    @property
    def hidden_size(self) -> int:
        return whole_shape(self.lm_head.weight)[1]

    @property
    def vocab_size(self) -> int:
        return whole_shape(self.lm_head.weight)[0]

    def unembedding(self, captured: Captured | None = None) -> Unembedding:
        """The lm_head, with the factor (Cohere, Granite) or soft cap (Gemma 2) on its logits.

        It is a constant unless the lm_head is trained, and has the dtype of autocast where that is
        on. ``captured`` keeps it for the pass: casting or gathering copies the weight.
        """
        if captured is not None and captured.unembedding is not None:
            return captured.unembedding
        known = self.probed()
        unembedding = self._unembedding(known.scale, known.softcap)
        # Without gradients a trained weight would be kept without its graph.
        if captured is not None and (torch.is_grad_enabled() or not self.lm_head.weight.requires_grad):
            captured.unembedding = unembedding
        return unembedding

    @property
    def final_norm(self) -> nn.Module | None:
        """The base model's norm between the last layer and the lm_head; None if there is none."""
        name = self.probed().norm_name
        return None if name is None else beneath_adapters(self.trunk.get_submodule(name))

    def normed(self, states: Tensor) -> Tensor:
        """Final norm of ``(..., hidden)``, same shape; ``states`` itself if the model has none."""
        norm = self.final_norm
        return states if norm is None else norm(states)

    @contextmanager
    def capture(self, labels: Tensor | None = None) -> Iterator[list[Captured]]:
        """`LayerStack.capture`, by the parts that the model has now.

        Some may have been replaced since the last pass, as by ``resize_token_embeddings``.
        """
        found = Backbone.of(self.model)
        if any(getattr(found, name) is not getattr(self, name) for name in ("trunk", "layers", "lm_head")):
            vars(self).update(vars(found))
        with super().capture(labels) as records:
            yield records

    def probed(self) -> Probe:
        """What a pass over a few tokens has shown of these parts.

        Norm and unembedding cannot be used without it. It comes after the first captured pass, not
        before: there a hook on the model (`FullFineTuning`) may run before FSDP2 has gathered it.

        Raises:
            TypeError: if the model does something between its last layer and its logits that this
                class does not know.
        """
        if self._probe is None:
            config = self.model.config.get_text_config()
            scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
            expected = self._unembedding(float(scale), getattr(config, "final_logit_softcapping", None))
            stack = LayerStack(trunk=self.trunk, layers=self.layers)
            self._probe = probe(self.model, stack, self.lm_head, expected)
            self.layers_return_tuples = stack.layers_return_tuples
        return self._probe

    def adapted_parts(self) -> list[str]:
        """Names of the parts behind the layers that PEFT has wrapped: the lm_head, a known norm."""
        parts = {"lm_head": self.model.get_output_embeddings()}
        if self._probe is not None and self._probe.norm_name is not None:
            parts[self._probe.norm_name] = self.trunk.get_submodule(self._probe.norm_name)
        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [name for name, part in parts.items() if isinstance(part, wrappers)]

    @property
    def verified(self) -> bool:
        """Whether a pass has shown that the parts compute what the model does."""
        return self._probe is not None

    def _unembedding(self, scale: float, softcap: float | None) -> Unembedding:
        weight, bias = parameter_of(self.lm_head, "weight"), parameter_of(self.lm_head, "bias")
        assert weight is not None
        return Unembedding(
            weight=_with_graph_if_trained(weight),
            bias=None if bias is None else _with_graph_if_trained(bias),
            scale=scale,
            softcap=softcap,
        ).in_compute_dtype(weight.device.type)


def _require_weights_at_hand(model: PreTrainedModel) -> None:
    """Raise a ValueError if weights are split over processes, or offloaded from the devices."""
    processes = getattr(model, "tp_size", None) or 1
    if processes > 1:
        raise ValueError(
            f"tp_plan: got a model split over {processes} processes (tensor parallelism), expected a whole one: heads, norm and "
            "unembedding are used outside the plan. Load it without tp_plan, and shard it with FSDP2."
        )
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    offloaded = places & {"disk", "cpu"}
    if "disk" in places or (offloaded and len(places) > 1):
        raise ValueError(
            f"device_map: got weights offloaded to {', '.join(sorted(offloaded))}, expected all on devices that compute. Load "
            "the model quantised, on more GPUs, or shard it with FSDP2."
        )


def _with_graph_if_trained(parameter: Tensor) -> Tensor:
    """All of a parameter of the lm_head, of any shape; a constant if it is frozen.

    A ValueError if it is trained, but whole only as a copy, which no gradient reaches.
    """
    all_of_it = whole(parameter)
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return all_of_it.detach()
    if all_of_it is not parameter:
        raise ValueError(
            "freeze_unembedding: got false with an engine that divides the lm_head while the model runs (ZeRO-3), expected true: its "
            "gradient would be lost. Set FullFineTuningConfig(freeze_unembedding=True), or train with FSDP2 or ZeRO-2."
        )
    return parameter


def _trunk_and_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList | None]:
    """The transformers model that runs the decoder layers, and their list; None if unknown.

    Towers for images or sound, which may have as many layers, lie beside the text decoder.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    first: tuple[nn.Module, nn.ModuleList | None] = (model, None)
    for found in chain(_lists_below(model.get_decoder()), _lists_below(model)):
        if len(found[1]) == count:
            return found
        first = first if first[1] is not None else found
    return first  # `probe` shows whether these are the layers


def _lists_below(top: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Lists of modules below ``top``, shallow ones first, with the transformers model around."""
    queue = [(top, top)]
    while queue:
        module, around = queue.pop(0)
        if isinstance(module, PreTrainedModel):
            around = module
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child):
                yield around, child
            queue.append((child, around))
