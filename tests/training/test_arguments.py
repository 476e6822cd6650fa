"""Options that stand behind those of a command: fields of LoraConfig and of TrainingArguments."""

from __future__ import annotations

import re

import pytest
from transformers import TrainingArguments

from peft_caft.training.arguments import lora_option_types, lora_options, trainer_arguments
from peft_caft.training.fine_tuning import fine_tune
from peft_caft.training.settings import FineTuningSettings, HeadTrainingSettings


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--use-dora"], {"use_dora": True}),
        (["--use_dora", "false"], {"use_dora": False}),
        (["--use-rslora=true"], {"use_rslora": True}),
        (["--modules-to-save", "lm_head,embed_tokens"], {"modules_to_save": ["lm_head", "embed_tokens"]}),
        (["--modules-to-save", '["lm_head"]'], {"modules_to_save": ["lm_head"]}),
        (["--rank-pattern", '{"q_proj": 4}'], {"rank_pattern": {"q_proj": 4}}),
        (["--init-lora-weights", "pissa_niter_4"], {"init_lora_weights": "pissa_niter_4"}),
        (["--init-lora-weights", "False"], {"init_lora_weights": False}),
        (["--layers-to-transform", "3"], {"layers_to_transform": 3}),
        (["--layer-replication", "[[0, 2], [1, 2]]"], {"layer_replication": [[0, 2], [1, 2]]}),
        (["--trainable-token-indices", "[1, 2]"], {"trainable_token_indices": [1, 2]}),
        (["--bias", "lora_only"], {"bias": "lora_only"}),
        (["--exclude-modules", "lm_head"], {"exclude_modules": ["lm_head"]}),
        (["--exclude-modules", ".*_head"], {"exclude_modules": ".*_head"}),
        (["--exclude-modules", "lm_head, q_proj"], {"exclude_modules": ["lm_head", "q_proj"]}),
        (["--exclude-modules", '"q_{1,2}"'], {"exclude_modules": "q_{1,2}"}),
        (["--layers-to-transform", "1,2"], {"layers_to_transform": [1, 2]}),
        (["--target-parameters", "a,b"], {"target_parameters": ["a", "b"]}),
    ],
)
def test_fields_of_lora_config_are_taken_by_their_types(options, fields):
    found, others = lora_options(["--seed", "1", *options, "--bf16", "true"])
    assert found == fields
    assert others == ["--seed", "1", "--bf16", "true"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use-dora", "maybe"], "--use_dora: got 'maybe', expected true or false"),
        (["--modules-to-save", "--use-dora"], "--modules_to_save: got no value, expected"),
        (["--bias", "some"], "--bias: got 'some', expected 'none' or 'all' or 'lora_only'"),
        (["--rank-pattern", "q_proj=4"], "--rank_pattern: got 'q_proj=4', expected a JSON object"),
        (["--layers-to-transform", "1.5"], "--layers_to_transform: got '1.5', expected"),
        (["--init-lora-weights", "pizza"], "--init_lora_weights: got 'pizza', expected true or false or 'gaussian'"),
        (["--eva-config", "{}"], "--eva_config: a command line cannot give it"),
        (["--task-type", "SEQ_CLS"], "--task_type: given, but this command sets it"),
        (["--inference-mode"], "--inference_mode: given, but this command sets it"),
    ],
)
def test_fields_that_a_command_line_cannot_give_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        lora_options(options)


@pytest.mark.parametrize(
    "option", ["--output_dir", "--output-dir", "--resume_from_checkpoint", "--eval_on_start=true"]
)
def test_options_that_the_command_would_overwrite_are_refused_by_name(option, tmp_path):
    name = option.removeprefix("--").partition("=")[0].replace("-", "_")
    with pytest.raises(ValueError, match=f"^{name}: given, but this command sets it: .+ Leave it out"):
        trainer_arguments(str(tmp_path), {}, None, [option, "x"], {"eval_on_start": "it evaluates"})


def test_keys_of_a_yaml_that_the_command_would_overwrite_are_refused_by_name(tmp_path):
    (tmp_path / "training.yaml").write_text("output_dir: elsewhere\n")
    with pytest.raises(ValueError, match=r"^output_dir: given"):
        trainer_arguments(str(tmp_path), {}, str(tmp_path / "training.yaml"))


@pytest.mark.parametrize(("option", "near"), [("--learning-rat", "learning_rate"), ("--use-dorra", "use_dora")])
def test_an_unknown_option_is_named_with_what_is_near_it(option, near, tmp_path):
    with pytest.raises(ValueError, match=rf"^{option}: unknown option, .+ Did you mean --{near}\?"):
        trainer_arguments(str(tmp_path), {}, None, [option, "1"], also_known=lora_option_types())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "lora.r: given, expected it left out: the setting of that name"),
        ({"task_type": "SEQ_CLS"}, "lora.task_type: given, expected it left out"),
        ({"use_dorra": True}, "lora.use_dorra: not a field of peft.LoraConfig, expected one of"),
        ({"init_lora_weights": "eva"}, "lora.init_lora_weights: got 'eva', which takes a preparation"),
        ({"init_lora_weights": "LoftQ"}, "lora.init_lora_weights: got 'LoftQ', which takes a preparation"),
        ({"use_dora": "yes"}, "lora.use_dora: got 'yes', expected true or false"),
        ({"layer_replication": [[0, 1]]}, "lora.layer_replication: got [[0, 1]] with method='caft'"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "lora.use_dora: got True with init_lora_weights='pissa'"),
        (
            {"init_lora_weights": "olora", "modules_to_save": ["lm_head"]},
            "lora.modules_to_save: got ['lm_head'] with init",
        ),
        ({"init_lora_weights": "pissa", "bias": "all"}, "lora.bias: got 'all' with init_lora_weights='pissa'"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
            "lora.use_rslora: got True with init_lora_weights='pissa'",
        ),
    ],
)
def test_fields_of_lora_config_that_cannot_be_are_refused_in_settings(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FineTuningSettings(model="", data="", output="", lora=fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "lora", "aux_loss_weight": 0.1},
            "aux_loss_weight: got 0.1 with method='lora', which has no use for it",
        ),
        ({"method": "full", "heads": "x"}, "heads: got 'x' with method='full'"),
        ({"method": "caft_full", "r": 4}, "r: got 4 with method='caft_full'"),
        ({"freeze_unembedding": True}, "freeze_unembedding: got True with method='caft'"),
        ({"heads": "x", "head_type": "residual"}, "head_type: got 'residual' beside heads, which have their own"),
        ({"heads_revision": "main"}, "heads_revision: got 'main' without heads"),
        ({"lora_dropout": 1}, "lora_dropout: got 1, expected a probability"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, expected a whole number of at least 1"),
        (
            {"load_in_8bit": True, "lora": {"init_lora_weights": "olora"}},
            "lora.init_lora_weights: got 'olora' with a quantised",
        ),
        ({"method": "adalora"}, "method: got 'adalora', expected one of 'caft', 'lora', 'caft_full', 'full'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FineTuningSettings(model="", data="", output="", **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
        ({"aux_loss_decay": 5}, "aux_loss_decay"),
    ],
)
def test_settings_of_heads_that_are_out_of_range_are_refused_at_once(settings, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        HeadTrainingSettings(model="", data=[], output="", **settings)


@pytest.mark.parametrize("name", ["load_in_4bit", "lora"])
def test_what_engines_that_divide_parameters_do_not_support_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    fields = {"lora": {"init_lora_weights": "pissa"}} if name == "lora" else {name: True}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    option = "init_lora_weights" if name == "lora" else name
    with pytest.raises(ValueError, match=rf"^{option}: given with an engine that divides parameters \(FSDP"):
        fine_tune(FineTuningSettings(model="", data="", output=str(tmp_path), **fields), arguments)
