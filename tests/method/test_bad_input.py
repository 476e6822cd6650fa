"""Models and situations that CAFT cannot work with: refused with a message that says what to do."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_caft import AuxiliaryHeads, CAFTConfig, load_adapter

from ..support.tiny_models import CONFIGS, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
BERT = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
T5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)


def config(**fields) -> CAFTConfig:
    return CAFTConfig(**{"target_modules": r".*(q_proj|query|\.q)", "aux_loss_schedule": "constant", **fields})


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: BertForMaskedLM(BERT), "BertForMaskedLM, which has no causal"),
        (lambda: LlamaForSequenceClassification(CONFIGS["llama"]()), "LlamaForSequenceClassification, which has no"),
        (lambda: LlamaModel(CONFIGS["llama"]()), "LlamaModel, which has no causal"),
        (lambda: T5ForConditionalGeneration(T5), "T5ForConditionalGeneration, an encoder-decoder"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "got Sequential, expected a transformers PreTrainedModel"),
    ],
    ids=["masked_lm", "sequence_classification", "no_lm_head", "encoder_decoder", "module"],
)
def test_model_without_causal_head_is_refused(make_model, message):
    with pytest.raises(TypeError, match=message):
        AuxiliaryHeads.from_base_model(make_model())
    with pytest.raises(TypeError, match=message):
        get_peft_model(make_model(), config())


def test_injection_without_the_tuner_is_refused():
    with pytest.raises(ValueError, match="get_peft_model"):
        inject_adapter_in_model(config(), tiny_model("llama"))


def test_training_an_adapter_loaded_for_inference_is_refused(tmp_path):
    get_peft_model(tiny_model("llama"), config()).save_pretrained(tmp_path)
    model = load_adapter(tiny_model("llama"), tmp_path, is_trainable=False).train()
    with pytest.raises(ValueError, match=r"loaded for inference.*is_trainable=True"):
        model(input_ids=tokens(), labels=tokens())
    assert torch.isfinite(model.eval()(input_ids=tokens(), labels=tokens()).loss)


def test_training_two_active_adapters_is_refused():
    model = get_peft_model(tiny_model("llama"), config()).train()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"got \['default', 'second'\], expected exactly one"):
        model(input_ids=tokens(), labels=tokens())
    with model.auxiliary_loss_enabled(False):
        assert torch.isfinite(model(input_ids=tokens(), labels=tokens()).loss)


def test_fresh_heads_warn_that_they_should_be_pretrained():
    with pytest.warns(UserWarning, match="pretrain"):
        get_peft_model(tiny_model("llama"), config())


def test_merged_adapter_hides_the_last_layer_from_fresh_heads():
    model = get_peft_model(tiny_model("llama"), config())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("second", config(head_type="decoder_layer"))
    assert list(model.peft_config) == ["default"]


def test_plain_lora_folder_cannot_be_continued_as_caft(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), lora).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="plain LoRA"):
        load_adapter(tiny_model("llama"), tmp_path)
    # ... but with the configuration at hand it can.
    model = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path, config=config(target_modules=["q_proj"]), is_trainable=True
    )
    assert torch.isfinite(model.train()(input_ids=tokens(), labels=tokens()).loss)


def test_progress_without_length_of_the_run_is_refused():
    model = get_peft_model(tiny_model("llama"), config(aux_loss_schedule="sine"))
    with pytest.raises(ValueError, match="total_steps: got None"):
        model.set_training_progress(3)


@pytest.mark.parametrize("moment", ["configured", "unknown"])
def test_run_of_no_steps_is_refused(moment):
    fields = {"total_steps": 5} if moment == "configured" else {}
    model = get_peft_model(tiny_model("llama"), config(aux_loss_schedule="sine", **fields))
    with pytest.raises(ValueError, match="total_steps: got 0"):
        model.set_training_progress(0, 0)
