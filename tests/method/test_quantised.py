"""CAFT on quantised base models, on the CPU: `make test-optional` has what they need, and where it is missing they are skipped."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_caft import AuxiliaryHeads
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.training import fine_tuning

from ..support.commands import peft_caft
from ..support.gradients import caft, gradients
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, write_chats
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
        # bitsandbytes packs weights in an evaluation on a CPU with AVX512 in bf16, and training would read them wrongly.
        states = [
            getattr(module.weight, "quant_state", None) for module in model.modules() if hasattr(module, "weight")
        ]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
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


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="see `make test-optional`")
@pytest.mark.parametrize(("option", "kind"), [("--load-in-4bit", "Linear4bit"), ("--load-in-8bit", "Linear8bitLt")])
def test_the_command_trains_on_a_quantised_base_and_writes_a_plain_adapter(option, kind, tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=64)
    data = write_chats(tmp_path / "data.jsonl", 20)
    kinds: set[str] = set()
    prepare = fine_tuning.prepare
    monkeypatch.setattr(
        fine_tuning,
        "prepare",
        lambda base, s: kinds.update(type(m).__name__ for m in base.modules()) or prepare(base, s),
    )
    places = ["--model", model, "--data", data, "--eval-data", data, "--output", str(tmp_path / "out")]
    peft_caft("train", *places, option, "--max_steps", "4", "--learning_rate", "1e-2", "--use_cpu", "true")
    assert kind in kinds
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    assert torch.isfinite(plain(input_ids=tokens() % 32).logits).all()
