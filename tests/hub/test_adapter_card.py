"""The card of an adapter says how it was trained."""

from __future__ import annotations

from peft import LoraConfig

from peft_caft.hub.adapter_card import adapter_card


def test_a_card_names_the_variant_of_lora_and_the_bits_of_the_base_model():
    config = LoraConfig(r=16, base_model_name_or_path="org/base")
    settings = {"lora": {"use_dora": True, "rank_pattern": {"q_proj": 2}}, "load_in_4bit": True, "load_in_8bit": False}
    lines = adapter_card(config, "org/adapter", None, settings, None).splitlines()
    assert "- LoRA settings: use_dora True, rank_pattern {'q_proj': 2}" in lines
    assert "- Trained on the base model in 4 bits" in lines
    plain = adapter_card(config, "org/adapter", None, {"lora": {}}, None)
    assert "LoRA settings" not in plain
    assert "bits" not in plain
