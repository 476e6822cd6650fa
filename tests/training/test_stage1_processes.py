"""Stage 1 in two processes under `accelerate launch`, on the CPU with gloo, against the same run in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from peft_caft import AuxiliaryHeads
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.training.arguments import trainer_arguments
from peft_caft.training.data import collator
from peft_caft.training.engine import sharding_requested
from peft_caft.training.head_trainer import HeadPretraining
from peft_caft.training.hidden_states_cache import cached_rows

from ..support.forked_command import in_two_processes
from ..support.processes import FSDP_ON_CPU, finish, in_one_process, kill_when, start, summary
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer, write_chats

# 12 steps of 12 rows in two epochs; the rows are grouped by length, in one order for any number of processes.
OPTIONS = [
    *("--max-length", "64", "--num_train_epochs", "2", "--learning_rate", "1e-2", "--logging_steps", "1"),
    *("--save_steps", "4", "--eval_steps", "8", "--use_cpu", "true"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_checkpoint(folder / "model"), "data": write_chats(folder / "data.jsonl", 80)}


def command(files: dict[str, str], output: Path, *options: str) -> list[str]:
    places = ["--model", files["model"], "--data", files["data"], "--output", str(output)]
    return ["train-heads", *places, *OPTIONS, *options]


def require_same_training(one: Path, two: Path, tolerance: float) -> None:
    """Losses and norms of every step, evaluations, and weights."""
    ours, theirs = summary(two), summary(one)
    assert len(ours["log_history"]) == len(theirs["log_history"])
    for own, other in zip(ours["log_history"], theirs["log_history"], strict=True):
        assert own.keys() == other.keys()
        for name in set(own) - {n for n in own if n.startswith("train_")}:
            assert own[name] == pytest.approx(other[name], abs=tolerance, rel=tolerance), name
    for own, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        for when in ("before", "after"):
            assert own[when]["acceptance_length"] == pytest.approx(other[when]["acceptance_length"])
            for head, expected in zip(own[when]["heads"], other[when]["heads"], strict=True):
                assert head == pytest.approx(expected, abs=tolerance)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "heads"
    in_one_process(command(files, folder, "--per_device_train_batch_size", "12"))
    return folder


def test_two_processes_train_as_one_does(files, one_process, tmp_path):
    two = ["peft-caft", *command(files, tmp_path / "heads", "--per_device_train_batch_size", "6")]
    output = "".join(in_two_processes("ddp.yaml", two, tmp_path))
    assert summary(tmp_path / "heads")["processes"] == 2
    require_same_training(one_process, tmp_path / "heads", tolerance=1e-5)
    # Rank 0 alone speaks.
    for line in ("Training data, data.jsonl", "Heads: ", "Acceptance length: ", "Heads written to"):
        assert output.count(line) == 1, output
    bars = {"Loading weights": 1, "Tokenizing": 2, "Held-out, before training, data": 1}
    assert {name: output.count(f"{name}:   0%|") for name in bars} == bars
    assert output.count(" 0/12 [00:00<?") == 1
    assert "Warning" not in output


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_take_up_what_was_killed(files, one_process, tmp_path):
    options = ["--cache", str(tmp_path / "cache"), "--per_device_train_batch_size"]
    heads = tmp_path / "heads"
    two = command(files, heads, *options, "6")
    kill_when((heads / "checkpoints" / "checkpoint-8" / "trainer_state.json").exists, start("ddp.yaml", two))
    assert set((tmp_path / "cache" / "done.bin").read_bytes()) == {1}
    with pytest.raises(AssertionError, match="processes: got 1, expected 2 to resume it"):
        in_one_process(two)
    output = finish(start("ddp.yaml", two))
    assert "Caching hidden states" not in output
    require_same_training(one_process, heads, tolerance=1e-5)

    output = in_one_process(command(files, tmp_path / "one", *options, "12"))
    assert "Caching hidden states" not in output
    require_same_training(one_process, tmp_path / "one", tolerance=1e-5)


@pytest.mark.slow
def test_no_process_writes_into_the_cache_of_something_else(files, tmp_path):
    cache = tmp_path / "cache"
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    cached_rows(cache, [row], tiny_llama().eval(), collator(tiny_tokenizer()), PartialState(cpu=True))
    (cache / "done.bin").write_bytes(bytes(1))  # as if it were not finished: there is something to write
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    process = start("ddp.yaml", command(files, tmp_path / "heads", "--cache", str(cache)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "holds hidden states of something else" in output
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--head-type", "decoder_layer", "--targets", "soft"),
        ("--head-type", "residual", "--targets", "hard"),
        ("--head-input", "last_hidden_state", "--dtype", "bfloat16", "--max_steps", "8"),
    ],
)
def test_sharded_models_train_as_whole_ones_and_are_taken_up_when_killed(options, files, tmp_path):
    if "bfloat16" in options:
        files = files | {"model": str(tmp_path / "tied")}
        tiny_llama(tie_word_embeddings=True).save_pretrained(files["model"])
        tiny_tokenizer().save_pretrained(files["model"])
    in_one_process(command(files, tmp_path / "one", "--per_device_train_batch_size", "12", *options))
    heads = tmp_path / "heads"
    arguments = command(files, heads, "--per_device_train_batch_size", "6", *options)
    checkpoint = heads / "checkpoints" / "checkpoint-4"
    kill_when((checkpoint / "trainer_state.json").exists, start("fsdp2.yaml", arguments, *FSDP_ON_CPU))
    assert (checkpoint / "optimizer.bin").is_file()  # FSDP's; elsewhere Trainer writes optimizer.pt
    assert not list(checkpoint.glob("pytorch_model_fsdp*"))  # the frozen base model has no place in a checkpoint
    output = finish(start("fsdp2.yaml", arguments, *FSDP_ON_CPU))
    assert output.count("Heads written to") == 1
    require_same_training(tmp_path / "one", heads, tolerance=2e-2 if "bfloat16" in options else 1e-5)


@pytest.mark.parametrize(
    ("environment", "cache", "message"),
    [
        ({"FSDP_VERSION": "1"}, None, "fsdp_version: got 1, expected 2"),
        (
            {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            None,
            "fsdp_cpu_ram_efficient_loading: got true, expected false",
        ),
        ({"FSDP_VERSION": "2"}, "states", "cache: got 'states' with a sharded model, expected none"),
    ],
)
def test_sharding_that_cannot_work_is_refused(environment, cache, message, tmp_path, monkeypatch):
    args = trainer_arguments(str(tmp_path), {}, options=["--use_cpu", "true"])
    assert not sharding_requested(args, "states")
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding_requested(args, cache)


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_parameter_gets_a_gradient_from_a_batch_without_targets(head_type, targets):
    """Else DDP would wait for it: a process may get such a batch while others get full ones."""
    model = tiny_llama()
    module = HeadPretraining(model, AuxiliaryHeads.from_base_model(model, 2, head_type), 0.8, targets).train()
    input_ids = torch.arange(2, 8)[None]
    module(input_ids=input_ids, labels=torch.full_like(input_ids, -100))["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.heads.parameters())
