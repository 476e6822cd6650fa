"""Stage 1 as a run: its options, its records and its errors, on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def trained(files):
    """Folder and record of a run with two data files, heads unlike the default ones, and a share of the positions."""
    text, heads = files["folder"] / "text.jsonl", files["folder"] / "heads"
    text.write_text("".join(json.dumps({"text": f"ethanol propane butane {i}"}) + "\n" for i in range(20)))
    text.with_name("text.provenance.json").write_text(json.dumps({"source": "made for this test"}))
    schedule = ["--max_steps", "6", "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "3"]
    kind = {"head_type": "residual", "num_heads": 2, "aux_token_fraction": 0.25}
    return heads, run(files, heads, *schedule, data=[files["data"], str(text)], **kind)


def test_several_data_files_are_recorded_one_by_one(files, trained):
    heads, record = trained
    assert [(d["file"], d["rows"]) for d in record["data"]] == [("data.jsonl", 36), ("text.jsonl", 18)]
    assert record["data"][1]["sha256"] == file_sha256(files["folder"] / "text.jsonl")
    assert record["data"][1]["provenance"] == {"source": "made for this test"}
    assert [e["name"] for e in record["evaluations"]] == ["data", "text"]
    assert record == json.loads((heads / "summary.json").read_text())


def test_every_head_is_logged_during_the_run(trained):
    _, record = trained
    losses = [entry for entry in record["log_history"] if "loss_head_2" in entry]
    assert len(losses) == 3
    assert {name for name in losses[0] if name.startswith("loss_head_")} == {"loss_head_2", "loss_head_3"}
    evaluations = [entry for entry in record["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == 2
    for name in ("head_2_loss", "head_3_top1", "head_3_top5", "acceptance_length"):
        assert f"eval_data_{name}" in evaluations[0]
    final = record["evaluations"][0]["after"]
    assert evaluations[-1]["eval_data_head_2_loss"] == pytest.approx(final["heads"][0]["cross_entropy"])


def test_a_share_of_the_positions_is_recorded_and_told(files, trained, tmp_path):
    heads, record = trained
    assert record["aux_token_fraction"] == 0.25
    assert "at 25% of the positions, drawn anew each step" in (heads / "README.md").read_text()
    with pytest.raises(ValueError, match=r"aux_token_fraction \(p\): got 0, expected 0 < p <= 1"):
        run(files, tmp_path / "none", aux_token_fraction=0)


def test_initial_heads_are_adapted_and_named(files, trained, tmp_path):
    first_heads, first = trained
    second = run(files, tmp_path / "second", "--max_steps", "8", init_heads=str(first_heads))
    assert second["initial_heads"] == "heads"
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (config["head_type"], config["num_heads"]) == ("residual", 2)
    (evaluation,), earlier = second["evaluations"], first["evaluations"][0]
    # Starts where the first run ended, and gets better.
    for before, ended in zip(evaluation["before"]["heads"], earlier["after"]["heads"], strict=True):
        assert before == pytest.approx(ended)
    assert evaluation["after"]["heads"][0]["cross_entropy"] < evaluation["before"]["heads"][0]["cross_entropy"]


@pytest.mark.parametrize(
    "kinds",
    [
        [("decoder_layer", "last_layer_input", "soft"), ("residual", "last_hidden_state", "hard")],
        pytest.param(
            [
                ("decoder_layer", "last_layer_input", "hard"),
                ("decoder_layer", "last_hidden_state", "soft"),
                ("decoder_layer", "last_hidden_state", "hard"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["each value", "other combinations"],
)
def test_one_cache_of_hidden_states_trains_the_same_heads_of_every_kind(kinds, files, tmp_path, capsys):
    two_epochs = ["--num_train_epochs", "2", "--per_device_train_batch_size", "12"]
    cache, written = tmp_path / "cache", set()
    for kind in kinds:
        plain, cached = tmp_path / "plain" / "-".join(kind), tmp_path / "cached" / "-".join(kind)
        common = dict(zip(("head_type", "head_input", "targets"), kind, strict=True))
        run(files, plain, *two_epochs, **common)
        run(files, cached, *two_epochs, cache=str(cache), **common)
        torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-4, atol=1e-4)
        written.add((cache / "hidden_states.bin").stat().st_mtime_ns)
    assert len(written) == 1
    assert capsys.readouterr().out.count("MiB in") == 1  # the size was announced


def test_initial_heads_and_a_head_type_exclude_each_other(files, tmp_path):
    with pytest.raises(ValueError, match=r"head_type: got 'residual' together with init_heads"):
        run(files, tmp_path / "out", init_heads="somewhere", head_type="residual")


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    model = tmp_path / "model"
    save_checkpoint(model, vocab_size=200)
    with pytest.raises(ValueError, match=r"tokenizer: got 300 tokens, expected at most 200"):
        run(files, tmp_path / "out", model=str(model))


def test_held_out_sets_of_one_name_are_refused(files, tmp_path):
    other = tmp_path / "data.jsonl"
    other.write_text(Path(files["data"]).read_text())
    with pytest.raises(ValueError, match=r"eval_data: got the names \['data', 'data'\]"):
        run(files, tmp_path / "out", data=[files["data"], str(other)])


def test_early_stopping_without_evaluations_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"early_stopping_patience: got 2 with eval_strategy"):
        run(files, tmp_path / "out", "--eval_strategy", "no", early_stopping_patience=2)
