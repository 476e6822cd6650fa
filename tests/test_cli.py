"""The commands on a tiny checkpoint, with their output, their errors, and a process that is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_caft import AuxiliaryHeads
from peft_caft.basics.files import file_sha256
from peft_caft.basics.run_folder import RunFolder, last_whole_checkpoint
from peft_caft.method.objective_config import ObjectiveConfig
from peft_caft.training.arguments import trainer_arguments
from peft_caft.training.data import collator, encode, read_jsonl
from peft_caft.training.settings import FineTuningSettings

from .support.commands import peft_caft
from .support.forked_command import kill_when
from .support.places import EXAMPLES, ROOT
from .support.tiny_checkpoint import save_checkpoint, write_chats

SMALL = ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, data, and heads that the command itself trained."""
    folder = tmp_path_factory.mktemp("files")
    model = save_checkpoint(folder / "model")
    (folder / "model" / "provenance.json").write_text('{"source": "a GGUF file", "conversion": "rounded"}')
    data = write_chats(folder / "data.jsonl", 40)
    heads = str(folder / "heads")
    # A random model's own distributions (soft targets) say little about the data.
    options = ["--targets", "hard", "--max-length", "64", "--learning_rate", "2e-2", "--num_train_epochs", "4", *SMALL]
    output = peft_caft("train-heads", "--model", model, "--data", data, "--output", heads, *options)
    return {"model": model, "data": data, "heads": heads, "output": output}


def test_train_heads_improves_every_head_and_reports_it(files):
    summary = json.loads((Path(files["heads"]) / "summary.json").read_text())
    (evaluation,) = summary["evaluations"]
    assert evaluation["name"] == "data"
    assert evaluation["after"]["acceptance_length"] >= evaluation["before"]["acceptance_length"]
    for before, after in zip(evaluation["before"]["heads"], evaluation["after"]["heads"], strict=True):
        assert after["cross_entropy"] < before["cross_entropy"] - 0.3
        assert after["top1"] >= before["top1"]
        assert 0 <= after["top1"] <= after["top5"] <= 1
    assert "| head (tokens ahead) |" in files["output"]


def test_trained_heads_record_where_they_come_from(files):
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    heads = AuxiliaryHeads.from_pretrained(files["heads"], base_model=model)
    training = heads.config.training
    (data,) = training["data"]
    assert data["sha256"] == file_sha256(files["data"])
    assert data["rows"] == 36  # one in ten of 40 was held out
    assert data["supervised_tokens"] < data["tokens"]
    assert training["seed"] == 42
    assert training["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert training["targets"] == "hard"
    assert training["evaluations"][0]["after"]["heads"][0]["tokens_ahead"] == 2
    assert heads.config.base_model_name_or_path == "model"  # no path of this machine
    card = (Path(files["heads"]) / "README.md").read_text()
    assert "| head (tokens ahead) |" in card
    assert str(Path(files["heads"]).parent) not in card
    assert "- Weights of the base model: a GGUF file; rounded" in card
    assert re.search(r"- Run: 36 steps \(4 epochs\) in \d+ s", card)  # 36 rows, 4 a step
    assert "measured on the weights named above, not on those of `model`" in card


@pytest.mark.parametrize("method", ["caft", "lora"])
def test_train_and_merge_give_a_plain_model(method, files, tmp_path):
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    heads = ["--heads", files["heads"]] if method == "caft" else []
    output = peft_caft(
        *("train", "--method", method, "--model", files["model"], "--data", files["data"], *heads),
        *("--eval-data", files["data"], "--output", adapter, "--max_steps", "6", "--learning_rate", "1e-2", *SMALL),
    )
    summary = json.loads(Path(adapter, "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert "Held-out next-token loss" in output
    peft_caft("merge", adapter, merged)
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(base, adapter)(input_ids=tokens).logits
        torch.testing.assert_close(plain(input_ids=tokens).logits, unmerged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("plain", "caft", "file"),
    [("lora", "caft", "adapter_model.safetensors"), ("full", "caft_full", "model.safetensors")],
)
def test_methods_share_seed_and_order_of_data(plain, caft, file, files, tmp_path):
    weights = []
    for method, options in ((plain, []), (caft, ["--heads", files["heads"], "--aux-loss-weight", "0"])):
        arguments = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / method)]
        peft_caft("train", "--method", method, *arguments, *options, "--max_steps", "3", *SMALL)
        weights.append(load_file(tmp_path / method / file))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


@pytest.mark.parametrize("method", ["caft_full", "full"])
def test_full_fine_tuning_writes_a_plain_model(method, files, tmp_path):
    output, base = tmp_path / "tuned", AutoModelForCausalLM.from_pretrained(files["model"])
    heads = ["--heads", files["heads"], "--train-heads", "full"] if method == "caft_full" else []
    printed = peft_caft(
        *("train", "--method", method, "--model", files["model"], "--data", files["data"], *heads),
        *("--freeze-unembedding", "--eval-data", files["data"], "--output", str(output)),
        *("--max_steps", "6", "--learning_rate", "1e-2", *SMALL),
    )
    assert f"Model written to {output}" in printed
    summary = json.loads((output / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["trainable_parameters"] >= base.num_parameters() - base.lm_head.weight.numel()
    tuned, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    assert type(tuned) is type(base)
    assert torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(tuned.model.norm.weight, base.model.norm.weight)
    assert (output / "tokenizer.json").is_file()
    if heads:
        trained = AuxiliaryHeads.from_pretrained(output / "trained_heads", base_model=tuned)
        before = AuxiliaryHeads.from_pretrained(files["heads"], base_model=base)
        assert all(not torch.equal(*pair) for pair in zip(trained.parameters(), before.parameters(), strict=True))


def test_whole_model_is_trained_in_fp32_unless_told_otherwise(files, tmp_path):
    half = shutil.copytree(files["model"], tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(files["model"], dtype=torch.bfloat16).save_pretrained(half)
    for options, dtype in ((["--dtype", "auto"], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)):
        output = tmp_path / options[1]
        common = ["--model", str(half), "--data", files["data"], "--output", str(output), "--max_steps", "1"]
        peft_caft("train", "--method", "full", *common, *options, *SMALL)
        assert load_file(output / "model.safetensors")["lm_head.weight"].dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze-unembedding"], "freeze_unembedding: got True with method='caft'"),
        (
            ["--method", "caft_full", "--train-heads", "lora"],
            "train_heads: got 'lora', expected one of 'frozen', 'full'",
        ),
    ],
)
def test_settings_of_another_method_are_refused(options, message, files, tmp_path):
    common = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / "new")]
    assert message in peft_caft("train", *common, *options, *SMALL, expect=1)


@pytest.mark.parametrize("command", ["train", "train-heads"])
def test_killed_run_is_taken_up_and_ends_as_an_unbroken_one(command, files, tmp_path, monkeypatch):
    common = [command, "--model", files["model"], "--data", files["data"], "--max-length", "64"]
    common += ["--heads", files["heads"]] if command == "train" else ["--num-heads", "2"]
    trainer = ["--max_steps", "10", "--save_steps", "2", *SMALL]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    arguments = ["peft-caft", *common, "--output", str(broken), *trainer]
    kill_when(lambda: last_whole_checkpoint(broken / "checkpoints") is not None, arguments, tmp_path / "log")
    assert not (broken / "summary.json").exists()
    # It is not taken up with other rows.
    contents = Path(files["data"]).read_bytes()
    write_chats(Path(files["data"]), 41)
    assert "data_sha256: got" in peft_caft(*common, "--output", str(broken), *trainer, expect=1)
    Path(files["data"]).write_bytes(contents)
    # Nor with another argument, whichever it is.
    other = ["--max_grad_norm", "0.5"]
    assert "max_grad_norm: got 0.5, expected 1.0" in peft_caft(
        *common, "--output", str(broken), *trainer, *other, expect=1
    )
    done = json.loads((last_whole_checkpoint(broken / "checkpoints") / "trainer_state.json").read_text())[
        "global_step"
    ]
    steps, step = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    peft_caft(*common, "--output", str(broken), *trainer, "--save_steps", "3")
    assert len(steps) == 10 - done  # it did not begin anew
    peft_caft(*common, "--output", str(unbroken), *trainer)
    name = "adapter_model.safetensors" if command == "train" else "model.safetensors"
    resumed, expected = load_file(broken / name), load_file(unbroken / name)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_what_is_said_not_to_matter_changes_no_weight_and_an_evaluation_does(files, tmp_path):
    """With dropout, since whatever draws a random number changes the masks after it."""
    common = ["--model", files["model"], "--data", files["data"], "--heads", files["heads"], "--lora-dropout", "0.3"]
    held_out = ["--eval-data", files["data"], "--eval-rows", "8", "--eval_strategy", "steps", "--eval_steps", "2"]
    weights = {}
    for name, options in {
        "as it is": [],
        "saves": ["--save_steps", "1", "--save_total_limit", "1"],
        "no saves": ["--save_strategy", "no"],
        "logs": ["--logging_nan_inf_filter", "false", "--logging_first_step", "true", "--log_level", "info"],
        "workers": ["--dataloader_num_workers", "2", "--dataloader_prefetch_factor", "1"],
        "memory": ["--torch_empty_cache_steps", "1", "--skip_memory_metrics", "false"],
        "counts": ["--include_num_input_tokens_seen", "true"],
        "evaluations": held_out,
    }.items():
        output = tmp_path / name
        peft_caft("train", *common, "--output", str(output), "--max_steps", "6", *SMALL, *options)
        weights[name] = load_file(output / "adapter_model.safetensors")
    expected = weights.pop("as it is")
    for name, found in weights.items():
        same = all(torch.equal(found[key], expected[key]) for key in expected)
        assert same == (name != "evaluations"), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "caft", "caft_full"])
def test_best_checkpoint_is_what_is_written_where_it_is_asked_for(method, files, tmp_path):
    heads = [] if method == "lora" else ["--heads", files["heads"]]
    options = ["--eval-data", files["data"], "--eval-rows", "8", "--eval_strategy", "steps", "--eval_steps", "1"]
    peft_caft(
        *("train", "--method", method, "--model", files["model"], "--data", files["data"], *heads, *options),
        *("--output", str(tmp_path / "out"), "--max_steps", "3", "--learning_rate", "100", "--warmup_steps", "8"),
        *("--load_best_model_at_end", "true", "--save_steps", "1", *SMALL),
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    losses = [entry["eval_loss"] for entry in summary["log_history"] if "eval_loss" in entry]
    assert min(losses[1:-1]) < losses[-2] - 0.1  # the last step was far from the best
    assert summary["eval_loss_after"] == pytest.approx(min(losses[1:]), rel=1e-4)


def test_finished_run_is_not_overwritten_by_accident(files):
    output = peft_caft(
        "train-heads", "--model", files["model"], "--data", files["data"], "--output", files["heads"], expect=1
    )
    assert "finished run" in output
    assert "--overwrite" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [("train-heads", ["--num-heads", "0"], "got 0"), ("train", ["--target-modules", "nowhere"], "nowhere")],
)
def test_wrong_option_and_folder_in_use_do_not_block_the_next_run(command, wrong, message, files, tmp_path):
    options = ["--num-heads", "2"] if command == "train-heads" else ["--heads", files["heads"]]
    common = [command, "--model", files["model"], "--data", files["data"], "--output", str(tmp_path), *options]
    common += ["--max-length", "64", "--max_steps", "2", *SMALL]
    assert message in peft_caft(*common, *wrong, expect=1)
    with RunFolder(tmp_path).held():
        assert "is being written by another process" in peft_caft(*common, expect=1)
    assert "written to" in peft_caft(*common)
    assert not list(tmp_path.glob(".*"))


def test_heads_trained_along_say_so_instead_of_showing_the_figures_of_stage_1(files, tmp_path):
    common = ["--model", files["model"], "--data", files["data"], "--heads", files["heads"], "--max-length", "64"]
    peft_caft("train", *common, "--train-heads", "full", "--output", str(tmp_path), "--max_steps", "2", *SMALL)
    heads = AuxiliaryHeads.from_pretrained(
        tmp_path / "trained_heads", AutoModelForCausalLM.from_pretrained(files["model"])
    )
    assert heads.config.training["stage"].startswith("2, along with an adapter")
    assert heads.config.training["initial_heads"] == "heads"
    assert heads.config.training["max_steps"] == 2
    card = (tmp_path / "trained_heads" / "README.md").read_text()
    assert "How good they are" not in card
    assert "Started from the heads `heads`" in card


def test_training_arguments_come_from_options_before_yaml_before_defaults(tmp_path):
    yaml_file = tmp_path / "training.yaml"
    yaml_file.write_text("learning_rate: 0.25\nmax_steps: 7\n")
    arguments = trainer_arguments(
        str(tmp_path), {"learning_rate": 0.5, "warmup_steps": 3}, str(yaml_file), ["--max_steps", "9"]
    )
    assert (arguments.learning_rate, arguments.max_steps, arguments.warmup_steps) == (0.25, 9, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rat", "1"], "--learning-rat: unknown option"),
        (["--max_steps", "many"], "max_steps"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: got 0.1, expected 0"),
        (["--training-yaml", "missing.yaml"], "missing.yaml"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_option_is_named_without_traceback(options, message, files, tmp_path):
    arguments = ["--model", files["model"], "--output", str(tmp_path / "out")]
    data = [] if "--data" in options else ["--data", files["data"]]
    output = peft_caft("train", *arguments, *data, *options, expect=1)
    assert message in output
    assert "Traceback" not in output


def test_wrong_yaml_key_is_named(tmp_path):
    yaml_file = tmp_path / "training.yaml"
    yaml_file.write_text("learning_speed: 1\n")
    with pytest.raises(ValueError, match="learning_speed"):
        trainer_arguments(str(tmp_path), {}, str(yaml_file))


def test_fields_of_lora_config_reach_the_adapter_and_its_record(files, tmp_path):
    options = ["--use-dora", "--rank-pattern", '{"q_proj": 2}', "--lora_bias", "false", "--max_steps", "1", *SMALL]
    places = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / "out")]
    peft_caft("train", *places, "--method", "lora", *options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["rank_pattern"], config["lora_bias"]) == (True, {"q_proj": 2}, False)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    assert recorded["lora"] == {"use_dora": True, "rank_pattern": {"q_proj": 2}, "lora_bias": False}


@pytest.mark.parametrize(("initialisation", "method"), [("pissa", "caft"), ("olora", "lora")])
def test_adapter_taken_out_of_the_base_weights_is_written_as_a_plain_one(initialisation, method, files, tmp_path):
    """PEFT would otherwise write an adapter that only fits the changed base model."""
    out, heads = tmp_path / "out", ["--heads", files["heads"]] if method == "caft" else []
    places = ["--model", files["model"], "--data", files["data"], "--eval-data", files["data"], "--output", str(out)]
    options = ["--init-lora-weights", initialisation, "--max_steps", "3", "--learning_rate", "1e-2", *SMALL]
    peft_caft("train", *places, "--method", method, *heads, *options)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 16)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files["model"]), out)
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    rows = encode(read_jsonl(files["data"]), tokenizer, 512).rows
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "eval"), use_cpu=True, report_to="none"),
        data_collator=collator(tokenizer),
        eval_dataset=rows,
    )
    expected = json.loads((out / "summary.json").read_text())["eval_loss_after"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_rank_above_the_size_of_a_matrix_is_refused_where_it_could_not_be_saved(files, tmp_path):
    places = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / "out")]
    output = peft_caft(
        "train", *places, "--method", "lora", "--init-lora-weights", "pissa", "--r", "40", *SMALL, expect=1
    )
    assert "r: got 40, expected at most" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-in-4bit", "--load-in-8bit"], "load_in_8bit: got True together with load_in_4bit"),
        (["--load-in-4bit", "--method", "full"], "load_in_4bit: got True with method='full'"),
        (["--use-dora", "--method", "caft_full"], "lora: got {'use_dora': True} with method='caft_full'"),
        (["--output_dir", "elsewhere"], "output_dir: given, but this command sets it"),
        (["--eval-data", ""], "--eval-data: got an empty text"),
        (["--method", "lora", "--label_smoothing_factor", "0.1"], "label_smoothing_factor: got 0.1, expected 0"),
        (["--eval_on_start", "true"], "eval_on_start: given, but this command sets it"),
        (["--aux-loss-decay", "2"], "aux_loss_decay (alpha): got 2.0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(options, message, files, tmp_path):
    places = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / "out")]
    assert message in peft_caft("train", *places, *options, expect=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_say_what_to_install(files, tmp_path):
    places = ["--model", files["model"], "--data", files["data"], "--output", str(tmp_path / "out")]
    assert "pip install bitsandbytes" in peft_caft("train", *places, "--load-in-4bit", expect=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "adapter: 'missing', revision main, is not in the local cache"),
        (["{adapter}", "{existing}"], "exists"),
    ],
)
def test_merge_refuses_what_it_cannot_merge(arguments, message, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    places = {"adapter": tmp_path / "adapter", "existing": tmp_path}
    output = peft_caft("merge", *(argument.format(**places) for argument in arguments), expect=1)
    assert message in output


def test_example_of_the_readme_runs(files, tmp_path, monkeypatch):
    script = str(EXAMPLES / "train_with_trainer.py")
    monkeypatch.setattr("sys.argv", [script, files["model"], files["heads"], files["data"], str(tmp_path / "out")])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")


def test_readme_shows_the_example():
    readme, script = (ROOT / "README.md").read_text(), (EXAMPLES / "train_with_trainer.py").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    assert [line for line in block.splitlines() if line and line not in script] == []


def test_commands_are_listed_in_the_order_of_the_work_with_whole_sentences():
    listed = " ".join(peft_caft("--help").partition("Commands:")[2].split())
    order = [
        "plan",
        "concepts",
        "distill",
        "train-heads",
        "train",
        "merge",
        "inspect",
        "push",
        "import-heads",
        "evaluate",
        "compare",
        "demo",
    ]
    sentences = [re.search(rf"(?:^| ){name} ([A-Z].*?\.)(?= |$)", listed) for name in order]
    assert all(sentences), listed
    assert [match.start() for match in sentences] == sorted(match.start() for match in sentences)
    assert "..." not in listed
    for name, sentence in zip(order, sentences, strict=True):
        assert sentence.group(1) in " ".join(peft_caft(name, "--help").split())


def test_options_stand_in_groups_and_say_what_they_are():
    output = peft_caft("train", "--help")
    groups = re.findall(r"^([A-Z][a-z ]+):$", output, re.MULTILINE)
    assert groups == ["Model and data", "Adapter", "Objective", "Run"]
    for cls in (FineTuningSettings, ObjectiveConfig):
        for field in dataclasses.fields(cls):
            if field.name not in ("lora", "heads_commit", "total_steps"):
                assert f"--{field.name.replace('_', '-')} " in output
                assert " ".join(field.metadata["help"].split()[:3]) in " ".join(output.split())
    assert re.search(r"--lora-dropout <?\w+>? +LoRA dropout probability\.\s+\[default: 0\.0\]", output, re.IGNORECASE)


@pytest.mark.parametrize(("command", "rate"), [("train-heads", "0.002"), ("train", "0.0001")])
def test_help_shows_the_defaults_that_decide_a_run(command, rate):
    output = " ".join(peft_caft(command, "--help").split())
    assert f"learning_rate {rate}" in output
    assert "per_device_train_batch_size 8" in output
