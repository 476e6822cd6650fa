"""Operations counted from shapes, against torch's own counter and against sums by hand."""

from __future__ import annotations

from pathlib import Path

import flops as flops_benchmark
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.planning.flops import ModelShapes, caft_step, lora_step

TOKENS = 64
TINY = {
    "vocab_size": 499,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class Counter(TorchDispatchMode):
    """torch's formulas, without the tracking of modules, which heads called under hooks confuse."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(model, supervised: float = 1.0) -> float:
    """Operations per token of one training step, by torch's counter; eager attention, whose products it sees one by one."""
    ids = torch.randint(1, TINY["vocab_size"], (2, TOKENS))
    labels = ids.clone()
    labels[:, : TOKENS - round(supervised * TOKENS)] = -100
    model(input_ids=ids, labels=labels)  # the first step also compares fast ways with plain ones
    with Counter() as counter:
        model(input_ids=ids, labels=labels).loss.backward()
    return counter.flops / ids.numel()


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation="eager")
    model.enable_input_require_grads()  # else the first layer saves a gradient, which the formulas do not know
    return model


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_lora_step_costs_what_torch_counts(base, gradient_checkpointing):
    model = get_peft_model(base, LoraConfig(**LORA)).train()
    if gradient_checkpointing:
        base.gradient_checkpointing_enable()
    try:
        measured = counted(model)
    finally:
        base.gradient_checkpointing_disable()
    expected = lora_step(ModelShapes.of(model), TOKENS, gradient_checkpointing=gradient_checkpointing)
    assert measured == pytest.approx(expected.total, rel=0.002)
    model.unload()


@pytest.mark.parametrize(("head_type", "tolerance"), [("residual", 0.015), ("decoder_layer", 0.04)])
def test_the_heads_cost_what_torch_counts(base, head_type, tolerance):
    lora = get_peft_model(base, LoraConfig(**LORA)).train()
    shapes, plain = ModelShapes.of(lora), counted(lora)
    lora.unload()
    heads = AuxiliaryHeads.from_base_model(base, num_heads=4, head_type=head_type)
    caft = get_peft_model(base, CAFTConfig(**LORA, head_type=head_type, aux_loss_schedule="constant")).train()
    measured = counted(caft) - plain
    caft.unload()
    with_target = sum(TOKENS - k for k in (2, 3, 4, 5)) / 4 / TOKENS  # the last tokens of a row have none
    expected = caft_step(shapes, TOKENS, head_type, len(heads.heads), with_target)
    # A decoder-layer head still runs whole over the few tokens without a target, too.
    assert measured == pytest.approx(expected.auxiliary, rel=tolerance)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize(("head_type", "tolerance"), [("residual", 0.02), ("decoder_layer", 0.05)])
def test_tokens_without_a_label_cost_nothing_beyond_the_limit(base, head_type, tolerance, fraction):
    """What a step of half supervised rows really computes is the limit that `caft_step` counts, sampled or not.

    A decoder layer is called twice, so that queries of all tokens and keys and values of selected ones are made in vain.
    """
    fields = {"head_type": head_type, "aux_token_fraction": fraction, "aux_loss_schedule": "constant"}
    model = get_peft_model(base, CAFTConfig(**LORA, **fields)).train()
    measured = counted(model, supervised=0.5)
    shapes = ModelShapes.of(model)
    model.unload()
    limit = caft_step(shapes, TOKENS, head_type, 4, 0.5, fraction).total
    assert measured == pytest.approx(limit, rel=tolerance)


@pytest.fixture(scope="module")
def published_models() -> dict[str, ModelShapes]:
    return {name: flops_benchmark.shapes_of(config) for name, config in flops_benchmark.MODELS.items()}


def test_llama_2_7b_by_hand(published_models):
    shapes = published_models["Llama-2 7B"]  # LoRA of rank 8
    layer = 4 * 4096**2 + 3 * 4096 * 11_008
    assert shapes.layer_weights == 32 * layer
    assert shapes.last_layer_weights == layer
    assert shapes.key_value_weights == 2 * 4096**2
    assert shapes.adapter_weights == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    unembedding, scores = 4096 * 32_000, 4 * 512 * 4096
    lora = lora_step(shapes, 512)
    assert lora.total == 4 * 32 * layer + 6 * shapes.adapter_weights + 3 * 32 * scores + 4 * unembedding
    residual = caft_step(shapes, 512, "residual", supervised=0.5)
    assert residual.total - lora.total == 0.5 * (4 * unembedding + 4 * 4 * (unembedding + 4096**2)) - 4 * unembedding
    # Of a decoder-layer head's own layer, keys and values are for all tokens.
    decoder = caft_step(shapes, 512, "decoder_layer", supervised=0.5, aux_token_fraction=0.25)
    seen, key_values = 0.125, 2 * 4096**2
    assert decoder.auxiliary == 4 * (
        4 * (seen * unembedding + key_values + seen * (layer - key_values)) + seen * 3 * scores
    )


def test_only_active_experts_of_a_mixture_count():
    config = MixtralConfig(
        **(TINY | {"num_hidden_layers": 2}), num_local_experts=8, num_experts_per_tok=2, head_dim=16
    )
    shapes = ModelShapes.of(on_meta(config))
    attention, expert = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 160
    assert shapes.layer_weights == 2 * (attention + 2 * expert + 8 * 64)  # and the router's
    assert shapes.adapter_weights == 0


def test_what_makes_no_sense_is_refused():
    shapes = ModelShapes.of(on_meta(LlamaConfig(**TINY)))
    with pytest.raises(ValueError, match="head_type: got 'linear', expected one of"):
        caft_step(shapes, 64, "linear")
    with pytest.raises(ValueError, match=r"aux_token_fraction \(p\): got 2"):
        caft_step(shapes, 64, "residual", aux_token_fraction=2)


def test_the_published_table_is_what_is_counted_and_keeps_its_promises(published_models):
    published = Path(flops_benchmark.__file__).parent / "flops" / "table.md"
    assert published.read_text(encoding="utf-8") == flops_benchmark.table(published_models) + "\n"
    for name in ("Llama-2 7B", "Llama-2 13B"):
        assert flops_benchmark.overhead(published_models[name], "residual", supervised=0.7) <= flops_benchmark.CLAIM
    for shapes in published_models.values():
        for head_type in HEAD_TYPES:
            assert flops_benchmark.overhead(shapes, head_type, 0.5, fraction=0.25) <= flops_benchmark.CLAIM
