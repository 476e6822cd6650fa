"""Options that stand behind those of a command: fields of LoraConfig and of TrainingArguments."""

from __future__ import annotations

import pytest

from peft_caft.training.arguments import lora_options, trainer_arguments


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
        (["--bias", "some"], "--bias: got 'some', expected 'none' or 'all' or 'lora_only'"),
        (["--rank-pattern", "q_proj=4"], "--rank_pattern: got 'q_proj=4', expected dict"),
        (["--layers-to-transform", "1.5"], "--layers_to_transform: got '1.5', expected"),
        (["--init-lora-weights", "pizza"], "--init_lora_weights: got 'pizza', expected true or false or 'gaussian'"),
        (["--init-lora-weights", "eva"], "--init_lora_weights: got 'eva', which needs a pass over data"),
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
        trainer_arguments(str(tmp_path), {}, None, [option, "1"])
