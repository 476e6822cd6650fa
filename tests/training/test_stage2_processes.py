"""Stage 2 in two processes under `accelerate launch`, on the CPU with gloo, against the same run in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_caft import AuxiliaryHeads
from peft_caft.heads.config import HEAD_TYPES

from ..support.forked_command import in_two_processes
from ..support.processes import FSDP_ON_CPU, finish, fsdp1_config, in_one_process, kill_when, start, summary
from ..support.tiny_checkpoint import save_checkpoint, write_chats

OPTIONS = [
    *(
        "--max-length",
        "64",
        "--max_steps",
        "6",
        "--learning_rate",
        "1e-2",
        "--logging_steps",
        "1",
        "--save_steps",
        "3",
    ),
    *("--aux-loss-weight", "0.5", "--use_cpu", "true", "--max_grad_norm", "1e9"),
]


# What becomes of the heads, with LoRA adapters, and with the whole model.
MODES = {"frozen": ("frozen",), "full": ("full", "--gradient_checkpointing", "true"), "lora": ("lora",)}
WHOLE = {
    "whole model": ("frozen", "--method", "caft_full", "--learning_rate", "1e-3"),
    "whole model but the unembedding": (
        *("full", "--method", "caft_full", "--learning_rate", "1e-3"),
        *("--freeze-unembedding", "--gradient_checkpointing", "true"),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return with_data_and_heads(save_checkpoint(folder / "model"), folder)


def with_data_and_heads(model: str, folder: Path) -> dict[str, str]:
    """A model, data, and heads of both types that were trained for it."""
    files = {"model": model, "data": write_chats(folder / "data.jsonl", 160)}
    for head_type in HEAD_TYPES:
        files[head_type] = str(folder / head_type)
        places = ["--model", files["model"], "--data", files["data"], "--output", files[head_type]]
        options = ["--head-type", head_type, "--max_steps", "3", "--max-length", "64", "--use_cpu", "true"]
        in_one_process(["train-heads", *places, *options])
    return files


def command(files: dict[str, str], output: Path, head_type: str | None, *options: str) -> list[str]:
    places = [
        "--model",
        files["model"],
        "--data",
        files["data"],
        "--eval-data",
        files["data"],
        "--eval-rows",
        "32",
        "--output",
        str(output),
    ]
    heads = [] if head_type is None else ["--heads", files[head_type]]
    return ["train", *places, *heads, *OPTIONS, *options]


def require_same_training(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    require_same_losses(one, two, tolerance)
    weights = require_same_weights(one, two, "adapter_model.safetensors", tolerance)
    assert any(weight.abs().max() > 1e-3 for name, weight in weights.items() if "lora_B" in name)


def require_same_model(start: str, one: Path, two: Path) -> None:
    """Of a run that trains the whole model, which began with that in ``start``."""
    require_same_losses(one, two)
    weights = require_same_weights(one, two, "model.safetensors")
    before = load_file(Path(start, "model.safetensors"))
    assert weights.keys() == before.keys()
    still = {name for name, weight in weights.items() if torch.equal(weight, before[name])}
    assert still <= {"lm_head.weight", "model.embed_tokens.weight"}


def require_same_losses(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = summary(two), summary(one)
    assert ours["processes"] == 2
    for own, other in zip(ours["log_history"], theirs["log_history"], strict=True):
        for name in {"loss", "grad_norm", "caft/gamma", "eval_loss"} & set(other):
            assert own[name] == pytest.approx(other[name], abs=tolerance, rel=tolerance), name


def require_same_weights(one: Path, two: Path, file: str, tolerance: float = 1e-5) -> dict[str, torch.Tensor]:
    weights, expected = load_file(two / file), load_file(one / file)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)
    return weights


def require_same_heads(start: str, one: Path, two: Path) -> None:
    """Trained heads are alike, and are not those that training started from."""
    ours = require_same_weights(one, two, "trained_heads/model.safetensors")
    initial = load_file(Path(start, "model.safetensors"))
    assert ours.keys() == initial.keys()
    assert any((ours[name] - initial[name]).abs().max() > 1e-4 for name in initial)


@pytest.mark.parametrize(
    ("head_type", "mode"),
    [
        ("residual", "frozen"),
        ("decoder_layer", "full"),
        pytest.param("residual", "full", marks=pytest.mark.slow),
        pytest.param("decoder_layer", "frozen", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(head_type, mode, files, tmp_path):
    options = ("--train-heads", *MODES[mode], "--per_device_train_batch_size")
    in_one_process(command(files, tmp_path / "one", head_type, *options, "8"))
    two = ["peft-caft", *command(files, tmp_path / "two", head_type, *options, "4")]
    outputs = in_two_processes("ddp.yaml", two, tmp_path)
    require_same_training(tmp_path / "one", tmp_path / "two")
    assert ["Training data: " in output for output in outputs] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_sharded_model_trains_as_a_whole_one_and_is_taken_up_when_killed(head_type, mode, files, tmp_path):
    options = ("--train-heads", *MODES[mode], "--per_device_train_batch_size")
    in_one_process(command(files, tmp_path / "one", head_type, *options, "8"))
    two = command(files, tmp_path / "two", head_type, *options, "4")
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-3"
    kill_when((checkpoint / "trainer_state.json").exists, start("fsdp2.yaml", two, *FSDP_ON_CPU))
    finish(start("fsdp2.yaml", two, *FSDP_ON_CPU))
    require_same_training(tmp_path / "one", tmp_path / "two")
    if mode != "frozen":
        require_same_heads(files[head_type], tmp_path / "one", tmp_path / "two")


def train_whole_model(files, folder: Path, mode: str, config: str, *program: str) -> None:
    """In one process; in two that are killed and taken up; and require the same of both."""
    options = ("--train-heads", *WHOLE[mode], "--per_device_train_batch_size")
    in_one_process(command(files, folder / "one", "decoder_layer", *options, "8"))
    two = command(files, folder / "two", "decoder_layer", *options, "4")
    checkpoint = folder / "two" / "checkpoints" / "checkpoint-3"
    kill_when((checkpoint / "trainer_state.json").exists, start(config, two, *program))
    finish(start(config, two, *program))
    require_same_model(files["model"], folder / "one", folder / "two")
    if "full" in WHOLE[mode]:
        require_same_heads(files["decoder_layer"], folder / "one", folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "program"), [("ddp.yaml", ()), ("fsdp2.yaml", FSDP_ON_CPU)])
@pytest.mark.parametrize("mode", WHOLE)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_processes_train_a_whole_model_as_one_does(tied, mode, config, program, files, tmp_path):
    if tied:
        files = files | {"model": save_checkpoint(tmp_path / "tied", tie_word_embeddings=True)}
        files["decoder_layer"] = str(tmp_path / "heads")
        AuxiliaryHeads.from_base_model(AutoModelForCausalLM.from_pretrained(files["model"])).save_pretrained(
            files["decoder_layer"]
        )
    train_whole_model(files, tmp_path, mode, config, *program)


@pytest.mark.slow
def test_fsdp1_is_refused(files, tmp_path):
    process = start(str(fsdp1_config(tmp_path)), command(files, tmp_path / "out", "residual"), *FSDP_ON_CPU)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "fsdp_version: got 1, expected 2" in output
