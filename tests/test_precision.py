"""CAFT in half precision, with a gradient scaler, and on quantised base models."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.config import HEAD_TYPES

from .tiny_checkpoint import tiny_llama
from .tiny_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
SETTINGS = {"r": 4, "target_modules": "all-linear", "aux_loss_weight": 0.7, "aux_loss_schedule": "constant"}
PRECISIONS = {
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "4 bit, nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def caft(base, **fields):
    torch.manual_seed(0)
    model = get_peft_model(base, CAFTConfig(**SETTINGS | fields)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_gradient_scaler_changes_nothing(head_type):
    """In fp16 autocast losses are scaled by 2^16 before the backward pass; unscaled, gradients are those of fp32."""
    found = []
    for scaled in (False, True):
        model = caft(tiny_llama(), head_type=head_type)
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        if not scaled:
            loss.backward()
        else:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        found.append(gradients(model))
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 0.02 * expected.norm() + 1e-4, name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=64).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantised(checkpoint, precision: str):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=PRECISIONS[precision], dtype=torch.bfloat16
    )


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_qlora_trains_with_heads_in_higher_precision(precision, head_type, checkpoint):
    base = prepare_model_for_kbit_training(quantised(checkpoint, precision), use_gradient_checkpointing=False)
    model = caft(base, head_type=head_type)
    heads = model.auxiliary_heads["default"]
    assert all(p.is_floating_point() for p in heads.parameters())
    results = []
    for fast in (True, False):
        model.zero_grad()
        with model.fast_paths_enabled(fast):
            output = model(input_ids=tokens(), labels=tokens())
        output.loss.backward()
        results.append((float(output.loss), gradients(model)))
    (loss, got), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert got.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoder_layer_heads_start_as_the_quantised_last_layer(precision, checkpoint):
    model = quantised(checkpoint, precision)
    heads = AuxiliaryHeads.from_base_model(model, num_heads=1)
    with torch.no_grad():
        expected, (got,) = model(input_ids=tokens()).logits.float(), heads.logits(model, tokens())
    assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_pretrained_heads_of_the_whole_model_fit_its_quantised_form(head_type, checkpoint, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    heads = AuxiliaryHeads.from_base_model(whole, head_type=head_type)
    for parameter in heads.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    heads.save_pretrained(tmp_path)
    model = caft(quantised(checkpoint, "4 bit"), heads=str(tmp_path))
    for name, tensor in heads.state_dict().items():
        assert torch.equal(model.auxiliary_heads["default"].state_dict()[name], tensor), name
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
