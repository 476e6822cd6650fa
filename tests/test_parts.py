"""The small parts by themselves: schedules, targets, writing files."""

from __future__ import annotations

import math

import pytest
import torch

from peft_caft.basics.files import filling, replacing
from peft_caft.method.schedule import gamma
from peft_caft.method.targets import supervised_count, supervised_rows


@pytest.mark.parametrize(
    ("schedule", "start", "third", "end"),
    [
        ("reflected_sine", 1.0, math.sin(math.pi / 3), 0.0),
        ("sine", 0.0, math.sin(math.pi / 6), 1.0),
        ("linear", 0.0, 1 / 3, 1.0),
        ("linear_decay", 1.0, 2 / 3, 0.0),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_schedule_has_the_papers_values(schedule, start, third, end):
    values = [gamma(schedule, step, 9) for step in (0, 3, 9, 20)]
    assert values == pytest.approx([start, third, end, end], abs=1e-12)


@pytest.mark.parametrize(("step", "total", "name"), [(0, 0, "total_steps"), (-1, 5, "step")])
def test_impossible_progress_is_refused(step, total, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        gamma("sine", step, total)


def test_targets_are_the_labels_k_ahead():
    labels = torch.tensor([[10, 11, -100, 13, 14], [20, -100, 22, -100, 24]])
    rows, targets = supervised_rows(labels, 2)
    assert rows.tolist() == [1, 2, 5, 7]
    assert targets.tolist() == [13, 14, 22, 24]


def test_targets_skip_padding_and_other_documents():
    labels = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    rows, targets = supervised_rows(labels, 2, mask, positions)
    assert rows.tolist() == [3, 6, 7]
    assert targets.tolist() == [5, 8, 9]
    shared_rows, _ = supervised_rows(labels, 2, mask, positions[:1])  # one row of positions for the whole batch
    assert shared_rows.tolist() == [3, 6]


def test_no_target_beyond_the_sequence():
    for k in (3, 4, 9):
        rows, targets = supervised_rows(torch.ones(2, 3, dtype=torch.long), k)
        assert rows.tolist() == targets.tolist() == []


def test_count_leaves_the_first_column_out():
    assert supervised_count(torch.tensor([[1, 2, -100], [-100, 5, 6]])) == 3


def interrupted(writing, name: str) -> None:
    with writing as temporary:
        (temporary if name == "" else temporary / name).write_text("ne")
        raise KeyboardInterrupt


def test_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(replacing(tmp_path / "file"), "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_interrupted_save_of_a_folder_leaves_every_old_file(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(filling(folder), "weights")
    assert (folder / "weights").read_text() == "old"
    with filling(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
