"""A run's folder: what may start in it, and which checkpoint is whole."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peft_caft.basics.run_folder import RunFolder, last_whole_checkpoint, random_states


def test_interrupted_run_of_other_settings_is_not_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"seed": 1, "learning_rate": 0.1})
    with pytest.raises(FileExistsError, match="seed: got 2, expected 1"):
        folder.begin({"seed": 2, "learning_rate": 0.1})
    assert folder.begin({"seed": 2, "learning_rate": 0.1}, overwrite=True) is None


def test_folder_is_held_by_one_at_a_time(tmp_path):
    """The holder removes the lock file, which others that wait have opened (`compare` waits so)."""
    folder, holders, seen = RunFolder(tmp_path), [], []

    def hold(index: int) -> None:
        for _ in range(5):
            with folder.held(wait=True):
                holders.append(index)
                time.sleep(0.002)
                seen.append(list(holders))
                holders.remove(index)

    with ThreadPoolExecutor(
        8
    ) as pool:  # each opens the file on its own, so that locks part threads as well as processes
        list(pool.map(hold, range(8)))
    assert [len(held) for held in seen] == [1] * 40
    assert not (tmp_path / ".lock").exists()


def interrupted(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin({"seed": 1})
    checkpoint = folder.checkpoints / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return folder


def test_finished_run_is_rid_of_what_a_kill_after_its_summary_left(tmp_path):
    folder = interrupted(tmp_path)
    folder.summary_path.write_text("{}")
    with folder.held(), pytest.raises(FileExistsError, match="finished run"):  # as if another process finished it
        folder.require_free({"seed": 1})
    assert folder.checkpoints.exists()
    (tmp_path / ".lock").touch()
    with pytest.raises(FileExistsError, match="finished run"):
        folder.require_free({"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "summary.json"}


@pytest.mark.parametrize("record", [{"seed": 1}, {"seed": 1, "record_format": 1}, []])
def test_run_whose_record_says_too_little_is_refused_by_name(record, tmp_path):
    folder = interrupted(tmp_path)
    folder.settings_path.write_text(json.dumps(record))
    with pytest.raises((FileExistsError, ValueError), match=r"of another version of peft-caft|expected a JSON object"):
        folder.begin({"seed": 1})
    assert folder.begin({"seed": 1}, overwrite=True) is None


def test_other_versions_warn_and_the_first_ones_stay_recorded(tmp_path):
    folder = interrupted(tmp_path)
    assert folder.begin({"seed": 1}) is not None  # and no warning
    record = json.loads(folder.settings_path.read_text())
    record["begun_with"]["torch"] = "1.0"
    folder.settings_path.write_text(json.dumps(record))
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"resumed by other code than it was begun with \(torch: got .*, expected '1.0'"
        ):
            assert folder.begin({"seed": 1}) == folder.checkpoints / "checkpoint-5"


def test_settings_that_come_later_are_compared_when_the_run_begins(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"seed": 1, "tokens": "a"})
    folder.require_free({"seed": 1}, to_come=("tokens",))
    with pytest.raises(FileExistsError, match="seed: got 2, expected 1"):
        folder.require_free({"seed": 2}, to_come=("tokens",))
    with pytest.raises(FileExistsError, match="tokens: got 'b', expected 'a'"):
        folder.begin({"seed": 1, "tokens": "b"})


def test_what_was_logged_for_tensorboard_outlives_the_checkpoints(tmp_path):
    folder = interrupted(tmp_path)
    events = folder.checkpoints / "runs" / "today" / "events"
    events.parent.mkdir(parents=True)
    events.write_text("loss")
    folder.finish({})
    assert (tmp_path / "runs" / "today" / "events").read_text() == "loss"
    assert not folder.checkpoints.exists()
    assert folder.result_of({"seed": 1}) == {}
    assert folder.result_of({"seed": 2}) is None


def test_half_saved_checkpoint_is_passed_over(tmp_path):
    for step, state in ((5, "{}"), (10, '{"global_st'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert last_whole_checkpoint(tmp_path, ("needed",)) is None


def test_checkpoint_whose_random_states_are_not_all_whole_is_passed_over(tmp_path):
    """Processes write them side by side, and the first one may have written everything else before."""
    for step in (4, 5):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        for name in random_states(2):
            torch.save({"cpu": torch.get_rng_state()}, folder / name)
    assert last_whole_checkpoint(tmp_path, random_states(2)) == tmp_path / "checkpoint-5"
    last = tmp_path / "checkpoint-5" / "rng_state_1.pth"
    last.write_bytes(last.read_bytes()[:-100])
    assert last_whole_checkpoint(tmp_path, random_states(2)) == tmp_path / "checkpoint-4"
    last.unlink()
    assert last_whole_checkpoint(tmp_path, random_states(2)) == tmp_path / "checkpoint-4"


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(flipped, id="a flipped bit"),
        pytest.param(Path.unlink, id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: (path.unlink(), os.mkfifo(path)), id="a pipe"),
        pytest.param(lambda path: (path.unlink(), path.symlink_to(path.name)), id="a link to itself"),
    ],
)
def test_checkpoint_with_a_damaged_optimizer_is_passed_over_and_set_aside(spoil, tmp_path):
    """Trainer would go on without an optimizer, or with the values that it finds."""
    folder = RunFolder(tmp_path)
    needed = (*random_states(1), "optimizer.pt")
    for step in (4, 5):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        for name in needed:
            torch.save({"exp_avg": torch.ones(1000)}, checkpoint / name)
    assert folder.begin({}, checkpoint_files=needed) == folder.checkpoints / "checkpoint-5"
    spoil(folder.checkpoints / "checkpoint-5" / "optimizer.pt")
    assert folder.begin({}, checkpoint_files=needed) == folder.checkpoints / "checkpoint-4"
    assert not (folder.checkpoints / "checkpoint-5").exists()  # what it holds would be in the way of the next save
    assert (folder.checkpoints / "damaged" / "checkpoint-5").is_dir()
    spoil(folder.checkpoints / "checkpoint-4" / "optimizer.pt")
    assert folder.begin({}, checkpoint_files=needed) is None
    assert os.listdir(folder.checkpoints / "damaged") == ["checkpoint-4"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read")
def test_checkpoint_that_the_disk_does_not_give_stays_as_it_is(tmp_path):
    """A read that fails for a moment, as on a disk of the network, says nothing about what the file holds."""
    folder = interrupted(tmp_path)
    state = folder.checkpoints / "checkpoint-5" / "trainer_state.json"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to("/proc/self/mem")  # its first byte cannot be read
    with pytest.raises(OSError, match=r"trainer_state.json: cannot be read \(Input/output error\)"):
        folder.begin({"seed": 1})
    state.unlink()
    (tmp_path / "elsewhere").rename(state)
    assert folder.begin({"seed": 1}) == state.parent


@pytest.mark.parametrize("state", ['{"chosen": 1}', '{"global_step": "x"}', "[]", '{"epoch": [1]}'])
def test_checkpoint_whose_state_is_another_record_is_passed_over(state, tmp_path):
    for step, text in ((4, "{}"), (5, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
