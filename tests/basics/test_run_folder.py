"""A run's folder: what may start in it, and which checkpoint is whole."""

from __future__ import annotations

import pytest
import torch

from peft_caft.basics.run_folder import RunFolder, last_whole_checkpoint, random_states


def test_interrupted_run_of_other_settings_is_not_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"seed": 1, "learning_rate": 0.1})
    with pytest.raises(FileExistsError, match="seed: got 2, expected 1"):
        folder.begin({"seed": 2, "learning_rate": 0.1})
    assert folder.begin({"seed": 2, "learning_rate": 0.1}, overwrite=True) is None


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
