"""Kill -9 at any moment of `peft-caft train-heads`, then the same command again: nothing is lost, doubled or read half-written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from peft_caft import AuxiliaryHeads
from peft_caft.training import hidden_states_cache as hidden_cache
from peft_caft.training.data import collator
from peft_caft.training.hidden_states_cache import cached_rows

from ..support.forked_command import finish, kill_when
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer, write_chats

# Two epochs of three steps, so that interruptions fall into a later epoch too.
OPTIONS = [
    *("--max-length", "64", "--num_train_epochs", "2", "--per_device_train_batch_size", "120"),
    *("--per_device_eval_batch_size", "40", "--eval_steps", "3", "--logging_steps", "3"),
    *("--learning_rate", "1e-2", "--use_cpu", "true"),
    *("--aux-token-fraction", "0.5"),  # the positions drawn after an interruption must be those of the whole run
]
STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_checkpoint(folder / "model"), "data": write_chats(folder / "data.jsonl", 400)}


def command(files: dict[str, str], folder: Path, *options: str) -> list[str]:
    places = ["--model", files["model"], "--data", files["data"], "--output", str(folder / "heads")]
    saves = () if "--early-stopping-patience" in options else ("--save_steps", "1")  # it saves when it evaluates
    return ["peft-caft", "train-heads", *places, "--cache", str(folder / "cache"), *OPTIONS, *saves, *options]


def require_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(f / "heads" / "model.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def require_nothing_half_written(heads: Path, expected: Path) -> None:
    """Where heads may be read, they are whole, or their absence is said in words."""
    model = tiny_llama()
    for folder in (heads, *heads.glob("checkpoints/checkpoint-*")):
        has_config = any((folder / name).is_file() for name in ("config.json", ".config.json.pending"))
        if not has_config or not (folder / "model.safetensors").is_file():
            with pytest.raises(FileNotFoundError, match=r"config\.json|model\.safetensors"):
                AuxiliaryHeads.from_pretrained(folder, base_model=model)
        else:
            found = AuxiliaryHeads.from_pretrained(folder, base_model=model)
            theirs = AuxiliaryHeads.from_pretrained(expected, base_model=model).state_dict()
            assert found.state_dict().keys() == theirs.keys()
            assert folder != heads or all(torch.equal(p, theirs[name]) for name, p in found.state_dict().items())


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(command(files, folder), folder / "log")
    return folder


def some_batches_done(folder: Path) -> bool:
    done = folder / "cache" / "done.bin"
    return done.is_file() and 0 < sum(done.read_bytes()) < done.stat().st_size


CHECKPOINT = "heads/checkpoints/checkpoint-"
MOMENTS = {
    "cache half full": some_batches_done,
    "between checkpoints": f"{CHECKPOINT}2/trainer_state.json",
    "heads of a checkpoint half written": f"{CHECKPOINT}3/.model.safetensors.*.tmp",
    "no optimizer in a checkpoint": f"{CHECKPOINT}4/README.md",
    "no trainer state in a checkpoint": f"{CHECKPOINT}5/optimizer.pt",
    "last checkpoint whole": f"{CHECKPOINT}{STEPS}/trainer_state.json",
    "weights of the artifact half written": "heads/.model.safetensors.*.tmp",
    "artifact without its configuration": "heads/model.safetensors",
    "artifact whole, no summary": "heads/config.json",
}
QUICK = ("cache half full", "between checkpoints", "artifact without its configuration")


@pytest.mark.parametrize(
    "moment", [moment if moment in QUICK else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS]
)
def test_killed_and_run_again_ends_as_if_never_killed(moment, files, uninterrupted, tmp_path):
    when = MOMENTS[moment]
    arguments = command(files, tmp_path)
    kill_when(
        (lambda: next(tmp_path.glob(when), None) is not None) if isinstance(when, str) else lambda: when(tmp_path),
        *(arguments, tmp_path / "log"),
    )
    assert not (tmp_path / "heads" / "summary.json").exists()
    require_nothing_half_written(tmp_path / "heads", uninterrupted / "heads")
    finish(arguments, tmp_path / "log")
    require_same_weights(tmp_path, uninterrupted)
    require_nothing_half_written(tmp_path / "heads", uninterrupted / "heads")
    assert list((tmp_path / "heads").glob(".*")) == []
    assert json.loads((tmp_path / "heads" / "summary.json").read_text())["steps"] == STEPS


EARLY = ("--eval_steps", "1", "--learning_rate", "0.5", "--warmup_steps", "0", "--num_train_epochs", "4")


def stopped(folder: Path) -> bool:
    """Whether the newest checkpoint is the one at which the run decided to stop."""
    states = sorted(folder.glob(f"{CHECKPOINT}*/trainer_state.json"), key=os.path.getmtime)
    try:
        callbacks = json.loads(states[-1].read_text())["stateful_callbacks"]
    except (IndexError, json.JSONDecodeError, FileNotFoundError):
        return False
    return callbacks["TrainerControl"]["args"]["should_training_stop"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the stop", "after the stop"])
def test_early_stopping_keeps_the_best_heads_and_survives_an_interruption(moment, files, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    patience = 2
    options = (*EARLY, "--early-stopping-patience", str(patience))
    finish(command(files, whole, *options), whole / "log")
    summary = json.loads((whole / "heads" / "summary.json").read_text())
    losses = [entry["eval_loss"] for entry in summary["log_history"] if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert summary["stopped_early"]
    assert len(losses) == best + 1 + patience
    after = summary["evaluations"][0]["after"]["heads"]
    assert sum(0.8 ** (h["tokens_ahead"] - 1) * h["cross_entropy"] for h in after) == pytest.approx(min(losses))

    arguments = command(files, cut, *options)
    before_the_stop = cut / f"{CHECKPOINT}{len(losses) - 1}" / "trainer_state.json"
    kill_when(before_the_stop.exists if moment == "before the stop" else lambda: stopped(cut), arguments, cut / "log")
    finish(arguments, cut / "log")
    again = json.loads((cut / "heads" / "summary.json").read_text())
    assert [entry["eval_loss"] for entry in again["log_history"] if "eval_loss" in entry] == losses
    assert again["steps"] == summary["steps"]
    require_same_weights(cut, whole)


ROWS = [{"input_ids": list(range(2, 2 + length)), "labels": list(range(2, 2 + length))} for length in range(4, 20)]


def fill(folder: Path, model=None, rows=ROWS) -> hidden_cache.CachedRows:
    model = tiny_llama().eval() if model is None else model
    return cached_rows(folder, rows, model, collator(tiny_tokenizer()), PartialState(cpu=True))


def test_batches_on_disk_are_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_cache, "BATCH_TOKENS", 40)
    whole = fill(tmp_path / "whole")
    fill(tmp_path / "cut")
    states, done = (np.memmap(tmp_path / "cut" / name, mode="r+") for name in ("hidden_states.bin", "done.bin"))
    states[:] = 0
    done[len(done) // 2 :] = 0  # as if it had been killed there; the zeros show what is computed from now on
    states.flush()
    done.flush()
    assert len(done) > 4
    cut = fill(tmp_path / "cut")
    computed = [bool(cut[index]["hidden_states"].any()) for index in range(len(ROWS))]
    skipped = {row for batch in hidden_cache._batches(ROWS)[: len(done) // 2] for row in batch}
    assert computed == [index not in skipped for index in range(len(ROWS))]
    for index in set(range(len(ROWS))) - skipped:
        assert torch.equal(cut[index]["hidden_states"], whole[index]["hidden_states"])


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ("model", "unembedding_fingerprint"),
        ("layers", "weights_sha256"),
        ("data", "tokens_sha256"),
        ("dtype", "dtype"),
    ],
)
def test_cache_of_something_else_is_refused(other, field, tmp_path):
    fill(tmp_path)
    model, rows = tiny_llama().eval(), ROWS
    if other == "model":
        model = tiny_llama(seed=1).eval()
    elif other == "layers":  # as after merging an adapter: the unembedding is the same
        model.model.layers[0].mlp.up_proj.weight.data += 0.001
    elif other == "data":
        rows = [*ROWS[:-1], {name: values[::-1] for name, values in ROWS[-1].items()}]
    else:
        model = model.bfloat16()
    match = rf"cache: .* something else; {field}: got .*, expected .*Choose another folder"
    with pytest.raises(ValueError, match=match):
        fill(tmp_path, model, rows)


def test_truncated_cache_is_made_anew(tmp_path):
    whole = fill(tmp_path)[0]["hidden_states"]
    path = tmp_path / "hidden_states.bin"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    again = fill(tmp_path)
    assert path.stat().st_size == size
    assert torch.equal(again[0]["hidden_states"], whole)
    assert again[len(ROWS) - 1]["hidden_states"].any()


def test_full_disk_is_told_before_the_cache_is_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs more rights")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        with pytest.raises(OSError, match=r"cache: got 0 MiB of free disk in .*without --cache"):
            fill(disk / "cache")
        assert not (disk / "cache" / "hidden_states.bin").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KB, which has no room for a checkpoint with its optimizer."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_runs_full_says_so_and_the_run_goes_on_when_there_is_room(files, small_disk, tmp_path):
    arguments = command(files, tmp_path)
    arguments[arguments.index("--output") + 1] = str(small_disk / "heads")
    output = finish(arguments, tmp_path / "log", expect=1)
    assert "is full. Checkpoints that were finished are kept" in output
    assert "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert "Heads written" in finish(arguments, tmp_path / "log")
