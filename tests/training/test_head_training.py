"""Stage 1 as a run: its options, its records and its errors, on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from peft_caft.basics.files import file_sha256
from peft_caft.training.arguments import trainer_arguments
from peft_caft.training.head_training import train_heads
from peft_caft.training.settings import HeadTrainingSettings

from ..support.tiny_checkpoint import save_checkpoint, write_chats

OPTIONS = ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--seed", "3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    return {
        "model": save_checkpoint(folder / "model"),
        "data": write_chats(folder / "data.jsonl", 40),
        "folder": folder,
    }


def run(files, output: Path, *options: str, **settings):
    settings = {"model": files["model"], "data": [files["data"]], "output": str(output), "max_length": 64} | settings
    arguments = trainer_arguments(str(output), {"warmup_steps": 2}, None, [*OPTIONS, *options])
    return train_heads(HeadTrainingSettings(**settings), arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("head_input", ["last_layer_input", "last_hidden_state"])
@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_cached_hidden_states_train_the_same_heads(targets, head_input, files, tmp_path):
    common = {"targets": targets, "head_input": head_input}
    two_epochs = ["--num_train_epochs", "2", "--per_device_train_batch_size", "12"]
    run(files, tmp_path / "plain", *two_epochs, **common)
    run(files, tmp_path / "cached", *two_epochs, cache=str(tmp_path / "cache"), **common)
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    assert plain.keys() == cached.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(cached[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_cache_is_reused_by_heads_of_another_kind(files, tmp_path, capsys):
    cache = tmp_path / "cache"
    run(files, tmp_path / "first", "--max_steps", "2", cache=str(cache))
    written = (cache / "hidden_states.bin").stat().st_mtime_ns
    assert "MiB in" in capsys.readouterr().out  # the size was announced
    run(files, tmp_path / "second", "--max_steps", "2", cache=str(cache), head_type="residual", targets="hard")
    assert (cache / "hidden_states.bin").stat().st_mtime_ns == written


def test_initial_heads_are_adapted_and_named(files, tmp_path):
    first = run(files, tmp_path / "first", "--max_steps", "20", head_type="residual", num_heads=2)
    second = run(files, tmp_path / "second", "--max_steps", "20", init_heads=str(tmp_path / "first"))
    assert second["initial_heads"] == "first"
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (config["head_type"], config["num_heads"]) == ("residual", 2)
    (evaluation,), (earlier,) = second["evaluations"], first["evaluations"]
    # Starts where the first run ended, and gets better.
    for before, ended in zip(evaluation["before"]["heads"], earlier["after"]["heads"], strict=True):
        assert before == pytest.approx(ended)
    assert evaluation["after"]["heads"][0]["cross_entropy"] < evaluation["before"]["heads"][0]["cross_entropy"]


def test_initial_heads_and_a_head_type_exclude_each_other(files, tmp_path):
    with pytest.raises(ValueError, match=r"head_type: got 'residual' together with init_heads"):
        run(files, tmp_path / "out", init_heads="somewhere", head_type="residual")


def test_several_data_files_are_recorded_one_by_one(files, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"ethanol propane butane {i}"}) + "\n" for i in range(20)))
    (tmp_path / "text.provenance.json").write_text(json.dumps({"source": "made for this test"}))
    summary = run(files, tmp_path / "out", "--max_steps", "2", data=[files["data"], str(text)])
    assert [(d["file"], d["rows"]) for d in summary["data"]] == [("data.jsonl", 36), ("text.jsonl", 18)]
    assert summary["data"][1]["sha256"] == file_sha256(text)
    assert summary["data"][1]["provenance"] == {"source": "made for this test"}
    assert [e["name"] for e in summary["evaluations"]] == ["data", "text"]
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_every_head_is_logged_during_the_run(files, tmp_path):
    summary = run(files, tmp_path / "out", "--max_steps", "6", "--logging_steps", "2", "--eval_strategy", "steps",
                  "--eval_steps", "3")  # fmt: skip
    log = summary["log_history"]
    losses = [entry for entry in log if "loss_head_2" in entry]
    assert len(losses) == 3
    assert all(f"loss_head_{k}" in losses[0] for k in (2, 3, 4, 5))
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluations) == 2
    for name in ("head_2_loss", "head_5_top1", "head_5_top5", "acceptance_length"):
        assert f"eval_data_{name}" in evaluations[0]
    final = summary["evaluations"][0]["after"]
    assert evaluations[-1]["eval_data_head_2_loss"] == pytest.approx(final["heads"][0]["cross_entropy"])


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    model = tmp_path / "model"
    save_checkpoint(model)
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match=r"tokenizer: got \d+ tokens, expected at most 300"):
        run(files, tmp_path / "out", model=str(model))


def test_held_out_sets_of_one_name_are_refused(files, tmp_path):
    other = tmp_path / "data.jsonl"
    other.write_text(Path(files["data"]).read_text())
    with pytest.raises(ValueError, match=r"eval_data: got the names \['data', 'data'\]"):
        run(files, tmp_path / "out", data=[files["data"], str(other)])


def test_a_share_of_the_positions_is_recorded_and_told(files, tmp_path):
    record = run(files, tmp_path / "heads", "--max_steps", "2", aux_token_fraction=0.25)
    assert record["aux_token_fraction"] == 0.25
    assert "at 25% of the positions, drawn anew each step" in (tmp_path / "heads" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"aux_token_fraction \(p\): got 0, expected 0 < p <= 1"):
        run(files, tmp_path / "none", aux_token_fraction=0)


def test_early_stopping_without_evaluations_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"early_stopping_patience: got 2 with eval_strategy"):
        run(files, tmp_path / "out", "--eval_strategy", "no", early_stopping_patience=2)
