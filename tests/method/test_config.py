"""`CAFTConfig`: what it refuses, and that it is LoRA on disk and CAFT in memory."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from peft_caft import CAFTConfig, CAFTModel
from peft_caft.method.config import caft_field_names
from peft_caft.method.registration import register


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_auxiliary_heads": 0}, r"num_auxiliary_heads: got 0, expected .* n >= 2"),
        ({"num_auxiliary_heads": 2.5}, "num_auxiliary_heads: got 2.5, expected a whole number"),
        ({"head_num_layers": 0}, "head_num_layers: got 0"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"head_type": "linear"}, "head_type: got 'linear', expected one of 'residual', 'decoder_layer'"),
        ({"head_input": "embeddings"}, "head_input: got 'embeddings'"),
        ({"aux_loss_schedule": "cosine"}, "aux_loss_schedule: got 'cosine', expected one of 'reflected_sine'"),
        ({"train_heads": "yes"}, "train_heads: got 'yes', expected one of 'frozen', 'lora', 'full'"),
        ({"aux_loss_weight": -0.1}, r"aux_loss_weight \(beta\): got -0.1, expected 0"),
        ({"aux_loss_weight": float("nan")}, r"aux_loss_weight \(beta\): got nan"),
        ({"aux_loss_weight": float("inf")}, r"aux_loss_weight \(beta\): got inf"),
        ({"aux_loss_decay": 0.0}, r"aux_loss_decay \(alpha\): got 0.0, expected 0 < alpha <= 1"),
        ({"aux_loss_decay": 1.1}, r"aux_loss_decay \(alpha\): got 1.1"),
        ({"aux_token_fraction": 0.0}, r"aux_token_fraction \(p\): got 0.0, expected 0 < p <= 1"),
        ({"aux_token_fraction": 1.5}, r"aux_token_fraction \(p\): got 1.5"),
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', expected 'CAUSAL_LM'"),
    ],
)
def test_field_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        CAFTConfig(**fields)


def test_task_type_is_causal_language_modelling_unless_told():
    assert CAFTConfig().task_type == "CAUSAL_LM"
    assert CAFTConfig().peft_type == "CAFT"


def test_every_added_field_has_a_help_text():
    fields = CAFTConfig.__dataclass_fields__
    assert all(fields[name].metadata["help"] for name in caft_field_names())
    assert len(caft_field_names()) == 13


def test_adapter_config_on_disk_is_what_lora_writes(tmp_path):
    shared = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}, "task_type": "CAUSAL_LM"}
    CAFTConfig(**shared, aux_loss_decay=0.5).save_pretrained(tmp_path / "caft")
    LoraConfig(**shared).save_pretrained(tmp_path / "lora")
    caft, lora = (json.loads((tmp_path / m / "adapter_config.json").read_text()) for m in ("caft", "lora"))
    for config in (caft, lora):
        config["target_modules"].sort()
    assert caft == lora
    assert json.loads((tmp_path / "caft" / "caft_config.json").read_text())["aux_loss_decay"] == 0.5


def test_plain_peft_reads_the_folder_as_lora_without_a_warning(tmp_path, recwarn):
    CAFTConfig(r=4).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is LoraConfig
    assert not recwarn.list


def test_round_trip_keeps_every_field(tmp_path):
    config = CAFTConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
        modules_to_save=["embed_tokens"],
        use_dora=True,
        heads="org/heads",
        heads_revision="v1",
        num_auxiliary_heads=2,
        head_type="residual",
        head_num_layers=3,
        head_input="last_hidden_state",
        aux_loss_weight=0.2,
        aux_loss_decay=0.9,
        aux_loss_schedule="linear",
        total_steps=7,
        train_heads="lora",
        aux_token_fraction=0.5,
    )
    config.save_pretrained(tmp_path)
    loaded = CAFTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_type == config.peft_type == "CAFT"


def test_heads_given_as_a_path_can_be_saved(tmp_path):
    config = CAFTConfig(heads=tmp_path / "heads")
    config.save_pretrained(tmp_path)
    assert CAFTConfig.from_pretrained(tmp_path).heads == str(tmp_path / "heads")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff\xfe", id="binary"),
    ],
)
def test_caft_configuration_that_is_no_json_object_is_refused(content, tmp_path):
    CAFTConfig().save_pretrained(tmp_path)
    (tmp_path / "caft_config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"caft_config\.json: (not valid JSON|got a list, expected a JSON object|not UTF-8)"
    ):
        CAFTConfig.from_pretrained(tmp_path)


def test_plain_lora_folder_is_not_taken_for_caft(tmp_path):
    LoraConfig(r=4).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"caft_config\.json not found"):
        CAFTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version in .*: got 2, expected 1"),
        ({"aux_loss_wait": 1}, r"unknown field\(s\) aux_loss_wait"),
        ({"aux_loss_schedule": "cosine"}, "aux_loss_schedule: got 'cosine'"),
    ],
)
def test_caft_configuration_of_another_kind_is_refused(changes, message, tmp_path):
    CAFTConfig().save_pretrained(tmp_path)
    path = tmp_path / "caft_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        CAFTConfig.from_pretrained(tmp_path)


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register(CAFTConfig, CAFTModel)
    assert list(PeftType) == before
    assert [member.name for member in before].count("CAFT") == 1
    assert PeftType("CAFT") is PeftType.CAFT
