"""Floating-point operations per token of a training step of LoRA or CAFT, from a model's shapes.

A multiplication and an addition are two operations. Only matrix products count: for each weight of
a linear map two operations forward, two for the gradient of its input, and two for its own gradient
if it is trained; and the scores of the attention. Norms, activations, softmax and the optimizer are
left out, as is usual (Kaplan et al., arXiv 2001.08361). So these counts are lower limits of the
work, and their ratios are the best that a step can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from ..basics.checks import require_choice, require_token_fraction
from ..heads.backbone import Backbone
from ..heads.config import DEFAULT_NUM_HEADS, HEAD_TYPES
from .parts import Parts

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2  # operations per weight and token


@dataclass(frozen=True)
class ModelShapes:
    """Sizes that decide what a token costs in a causal language model with LoRA.

    Attributes:
        layer_weights: weights in the linear maps of all layers; of experts, the active ones.
        last_layer_weights: such weights in the last layer, which heads may copy.
        key_value_weights: weights of one layer that make keys and values.
        attention_width: number of query heads times their size.
        adapter_weights: LoRA weights in the layers.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    layer_weights: float
    last_layer_weights: float
    key_value_weights: int
    attention_width: int
    adapter_weights: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelShapes:
        """Of ``model``, with or without LoRA; it may be on the meta device."""
        backbone = Backbone.of(model)
        config = backbone.model.config.get_text_config()
        query_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or backbone.hidden_size // query_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or query_heads
        layers = [_weights(layer, config) for layer in backbone.layers]
        return cls(
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            num_layers=len(layers),
            layer_weights=sum(base for base, _ in layers),
            last_layer_weights=layers[-1][0],
            key_value_weights=2 * backbone.hidden_size * key_value_heads * head_size,
            attention_width=query_heads * head_size,
            adapter_weights=sum(adapter for _, adapter in layers),
        )

    @property
    def unembedding_weights(self) -> int:
        return self.hidden_size * self.vocab_size


def number_of_experts(config: PretrainedConfig) -> int:
    """Number of experts in a layer of a mixture; 0 for other models."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _weights(layer: nn.Module, config: PretrainedConfig) -> tuple[float, int]:
    """Number of base-model weights that a token passes in one layer, and number of LoRA weights."""
    experts = number_of_experts(config)
    active = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
    base, adapter = 0.0, 0
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            adapter += parameter.numel()
        elif parameter.dim() == 3:  # all experts in one tensor
            base += parameter.numel() * active
        elif parameter.dim() == 2:
            base += parameter.numel()
    return base, adapter


@dataclass(frozen=True)
class StepFlops(Parts):
    """Operations of one training step per token, forward and backward.

    Attributes:
        layers: the base model's layers with their adapters.
        unembedding: the model's own next-token loss.
        auxiliary: the heads and their losses; 0 for LoRA.
    """

    layers: float
    unembedding: float
    auxiliary: float = 0.0


def lora_step(
    shapes: ModelShapes, keys: float, supervised: float = 1.0, gradient_checkpointing: bool = False
) -> StepFlops:
    """A step of LoRA.

    Args:
        keys: mean number of keys that a query meets; half of a row if the causal mask saves work.
        supervised: share of the tokens whose logits are computed; 1 for transformers' loss.
        gradient_checkpointing: run every layer forward once more.
    """
    passes = FORWARD * (2 if gradient_checkpointing else 1)
    scores = shapes.num_layers * _scores(shapes, keys)
    layers = (passes + INPUT_GRADIENT) * shapes.layer_weights
    layers += (passes + INPUT_GRADIENT + WEIGHT_GRADIENT) * shapes.adapter_weights
    layers += (passes / FORWARD + 2) * scores  # each of the two products has two gradients
    return StepFlops(layers, supervised * (FORWARD + INPUT_GRADIENT) * shapes.unembedding_weights)


def caft_step(
    shapes: ModelShapes,
    keys: float,
    head_type: str,
    num_heads: int = DEFAULT_NUM_HEADS,
    supervised: float = 1.0,
    aux_token_fraction: float = 1.0,
    gradient_checkpointing: bool = False,
    head_num_layers: int = 1,
) -> StepFlops:
    """A step of CAFT with frozen heads in which only supervised tokens reach an unembedding.

    Args:
        shapes, keys, gradient_checkpointing: arguments of `lora_step`.
        head_type: ``"residual"``, or ``"decoder_layer"``, whose keys and values need every token.
        num_heads: number of heads, n - 1.
        supervised: s, share of the tokens that have a label.
        aux_token_fraction: p, share of the supervised tokens that the heads see.
        head_num_layers: blocks or layers of a head; of layers, all but the last need every token.
    """
    require_choice("head_type", head_type, HEAD_TYPES)
    require_token_fraction(aux_token_fraction)
    plain = lora_step(shapes, keys, supervised, gradient_checkpointing)
    both = FORWARD + INPUT_GRADIENT
    seen = supervised * aux_token_fraction
    head = seen * both * shapes.unembedding_weights
    if head_type == "residual":
        head += head_num_layers * seen * both * shapes.hidden_size**2
    else:
        layer, scores = shapes.last_layer_weights, 3 * _scores(shapes, keys)
        key_values = shapes.key_value_weights
        head += both * (key_values + seen * (layer - key_values)) + seen * scores
        head += (head_num_layers - 1) * (both * layer + scores)
    return StepFlops(plain.layers, plain.unembedding, num_heads * head)


def _scores(shapes: ModelShapes, keys: float) -> float:
    """Operations per token of a layer's attention forward: queries x keys, and weights x values."""
    return 2 * 2 * keys * shapes.attention_width
