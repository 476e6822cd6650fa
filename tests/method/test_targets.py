"""Targets of head k: the labels k ahead, in the same document."""

from __future__ import annotations

import torch

from peft_caft.method.targets import supervised_count, supervised_rows


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
