"""CAFT on quantised base models, on the CPU: `make test-optional` has what they need, and where it is missing they are skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_caft import AuxiliaryHeads
from peft_caft.heads.config import HEAD_TYPES

from ..support.gradients import caft, gradients
from ..support.tiny_checkpoint import tiny_llama
from ..support.tiny_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])


PRECISIONS = {
    "bitsandbytes, 4 bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bitsandbytes, 4 bit, nested": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bitsandbytes, 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao, 8 bit": torchao_int8,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=64).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantised(checkpoint, precision: str):
    if find_spec(precision.split(",")[0]) is None:
        pytest.skip("see `make test-optional`")
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=PRECISIONS[precision](), dtype=torch.bfloat16, device_map="cpu"
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
    model = caft(quantised(checkpoint, "bitsandbytes, 4 bit"), heads=str(tmp_path))
    for name, tensor in heads.state_dict().items():
        assert torch.equal(model.auxiliary_heads["default"].state_dict()[name], tensor), name
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
