"""Options that stand behind those of a command: fields of LoraConfig and of TrainingArguments."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from peft_caft.training.arguments import (
    identity,
    lora_option_types,
    lora_options,
    require_honoured,
    trainer_arguments,
)
from peft_caft.training.defaults import IRRELEVANT, NOT_HONOURED, STAGE_1, STAGE_2
from peft_caft.training.fine_tuning import fine_tune, prepare
from peft_caft.training.settings import DistillationSettings, FineTuningSettings, HeadTrainingSettings

from ..support.tiny_checkpoint import tiny_llama


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
        ({"exclude_modules": "["}, "lora.exclude_modules: got '[', expected a regular expression"),
        ({"alpha_pattern": {"(": 2}}, "lora.alpha_pattern: got '(', expected a regular expression"),
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
        ({"heads": ".", "heads_revision": "main"}, "heads_revision: got 'main' beside a folder of heads"),
        ({"eval_rows": 10}, "eval_rows: got 10 without eval_data"),
        ({"total_steps": 10}, "total_steps: got 10 beside a Trainer"),
        ({"aux_loss_weight": 0, "train_heads": "full"}, "train_heads: got 'full' with aux_loss_weight=0"),
        ({"aux_loss_weight": 0, "aux_loss_decay": 0.5}, "aux_loss_decay: got 0.5 with aux_loss_weight=0"),
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


def other_value(value: Any) -> Any:
    """A value that is not ``value``, of a kind that fits well enough to be compared."""
    if isinstance(value, bool):
        return not value
    if value is None or isinstance(value, (int, float)):
        return (value or 0) + 7
    return ["x"] if isinstance(value, list) else "x"


def test_every_field_of_training_arguments_is_recorded_or_irrelevant_or_refused(tmp_path):
    """Of what transformers may add, it is recorded, until someone knows better."""
    found = {"recorded": set(), "irrelevant": set(), "refused": set()}
    for field in dataclasses.fields(TrainingArguments):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        before = identity(args)
        setattr(args, field.name, other_value(getattr(args, field.name)))
        if field.name == "report_to":  # whatever is installed
            args.report_to = get_available_reporting_integrations()
        if field.name == "deepspeed":  # the name of a file, which says nothing about its contents
            args.deepspeed = {"stage": 2}
        try:
            require_honoured(args, {})
        except ValueError as error:
            assert str(error).startswith(f"{field.name}: got ")  # noqa: PT017
            found["refused"].add(field.name)
            continue
        found["irrelevant" if identity(args) == before else "recorded"].add(field.name)
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert found["irrelevant"] == IRRELEVANT.keys() & names
    assert found["refused"] == NOT_HONOURED.keys() & names
    assert {
        "max_grad_norm",
        "neftune_noise_alpha",
        "adam_beta2",
        "eval_steps",
        "bf16",
        "lr_scheduler_kwargs",
    } <= found["recorded"]
    assert not (IRRELEVANT.keys() | NOT_HONOURED.keys()) - names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub", "true"], "push_to_hub: got True, expected False: `peft-caft push` publishes"),
        (["--hub_token", "secret"], "hub_token: got a text, expected None"),
        (["--remove_unused_columns", "false"], "remove_unused_columns: got False, expected True"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: got 0, expected at least 1"),
        (["--num_train_epochs", "0"], "num_train_epochs: got 0.0, expected more than 0"),
        (["--max_steps", "0"], "max_steps: got 0, expected more than 0"),
        (["--neftune_noise_alpha", "-1"], "neftune_noise_alpha: got -1.0, expected at least 0"),
        (["--report_to", "tensorboard"], "report_to: got 'tensorboard', whose package is not installed"),
        (["--eval_steps", "5"], "eval_steps: given with eval_strategy='no', where it has no effect"),
        (["--save_steps", "5", "--save_strategy", "epoch"], "save_steps: given with save_strategy='epoch'"),
        (["--optim_args", "x=1"], "optim_args: given with optim='adamw_torch"),
        (["--optim_target_modules", "all-linear"], "optim_target_modules: given with optim='adamw_torch"),
        (["--metric_for_best_model", "x"], "metric_for_best_model: given with nothing that looks for the best"),
        (["--fsdp_config", '{"x": 1}'], "fsdp_config: given with fsdp unset"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "gradient_checkpointing_kwargs: given with"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused_by_name(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_caft.training.arguments.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        trainer_arguments(str(tmp_path), {}, None, options)


def test_values_that_are_the_default_are_no_offence(tmp_path):
    options = ["--push_to_hub", "false", "--remove_unused_columns", "true", "--do_train", "true"]
    assert trainer_arguments(str(tmp_path), STAGE_2, None, options).push_to_hub is False


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, ["--eval_strategy", "steps"], "eval_strategy: got 'steps', expected 'no': there are no held-out data"),
        ({}, ["--do_eval", "true"], "do_eval: got True, expected False: there are no held-out data"),
        ({}, ["--per_device_eval_batch_size", "4"], "per_device_eval_batch_size: got 4"),
        ({}, ["--restore_callback_states_from_checkpoint", "true"], "restore_callback_states_from_checkpoint: got"),
        (
            {"eval_data": "x", "train_heads": "full"},
            ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "200"],
            "load_best_model_at_end: got True, expected False: the trained heads would stay",
        ),
    ],
)
def test_arguments_that_a_fine_tuning_has_no_use_for_are_refused_by_name(settings, options, message, tmp_path):
    found = FineTuningSettings(model="", data="", output="", **settings)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        trainer_arguments(str(tmp_path), STAGE_2, None, options, found.set_by_command, found.unused_arguments)


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "activation_checkpointing", "gradient_checkpointing"])
def test_arguments_that_the_training_of_heads_has_no_use_for_are_refused_by_name(name, tmp_path):
    found = HeadTrainingSettings(model="", data=[], output="")
    with pytest.raises(ValueError, match=f"^{name}|^activation_checkpointing: got"):
        trainer_arguments(str(tmp_path), STAGE_1, None, [f"--{name}", "1"], {}, found.unused_arguments)


def test_python_callers_are_told_the_same(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", resume_from_checkpoint="elsewhere")
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: got 'elsewhere', expected None: an interrupted run"
    ):
        fine_tune(FineTuningSettings(model="", data="", output=str(tmp_path)), arguments)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["nowhere"]}, "lora.modules_to_save: got 'nowhere', expected a name in the model"),
        ({"rank_pattern": {"nowhere": 4}}, "lora.rank_pattern: got 'nowhere'"),
        ({"alpha_pattern": {".*nowhere": 4}}, "lora.alpha_pattern: got '.*nowhere'"),
        ({"exclude_modules": "nowhere"}, "lora.exclude_modules: got 'nowhere'"),
        (
            {"trainable_token_indices": [5, 99999]},
            "lora.trainable_token_indices: got 99999, expected at least 0 and less",
        ),
        ({"trainable_token_indices": {"embed_tokens": [300]}}, "lora.trainable_token_indices: got 300"),
    ],
)
def test_what_the_model_lacks_is_named(lora, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        prepare(tiny_llama(), FineTuningSettings(model="", data="", output="", method="lora", lora=lora))


def test_what_the_model_has_is_taken():
    lora = {
        "modules_to_save": ["norm"],
        "rank_pattern": {"q_proj": 4, r".*layers\.1\.mlp.*": 2},
        "exclude_modules": ["k_proj"],
        "trainable_token_indices": [5],
    }
    prepared = prepare(tiny_llama(), FineTuningSettings(model="", data="", output="", method="lora", lora=lora))
    ranks = {name: m.r["default"] for name, m in prepared.named_modules() if isinstance(getattr(m, "r", None), dict)}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {4}
    assert not any(name.endswith("k_proj") for name in ranks)


@pytest.mark.parametrize("name", ["top_p", "top_k", "samples_per_prompt"])
def test_options_of_sampling_without_sampling_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: got .* with temperature=0"):
        DistillationSettings(
            model="", prompts="p", output="o.jsonl", temperature=0, **{name: 0.5 if name == "top_p" else 2}
        )


def test_checking_arguments_leaves_the_state_of_accelerate_and_deepspeed_alone(tmp_path, monkeypatch):
    """Other TrainingArguments would reset it: DeepSpeed's ZeRO-3 would no longer be seen when the model is loaded."""
    args = trainer_arguments(str(tmp_path), {})
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: pytest.fail("made once more"))
    require_honoured(args, {})


def test_a_run_is_resumed_with_the_precision_of_its_engine(tmp_path, monkeypatch):
    plain = identity(trainer_arguments(str(tmp_path), {}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert identity(trainer_arguments(str(tmp_path), {})) != plain


def test_saving_decides_which_checkpoint_may_be_the_best(tmp_path):
    options = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "4"]
    best = [*options, "--load_best_model_at_end", "true"]
    assert "save_steps" not in identity(trainer_arguments(str(tmp_path), {}, options=options))
    assert identity(trainer_arguments(str(tmp_path), {}, options=best))["save_steps"] == 4
