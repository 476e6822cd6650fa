"""Targets of head k: the labels k ahead, in the same document."""

from __future__ import annotations

import torch

from peft_caft.method.targets import Supervision


def test_targets_are_the_labels_k_ahead():
    labels = torch.tensor([[10, 11, -100, 13, 14], [20, -100, 22, -100, 24]])
    (head,) = Supervision.of(labels, 1).heads
    assert head.rows.tolist() == [1, 2, 5, 7]
    assert head.targets.tolist() == [13, 14, 22, 24]
    assert (head.count, head.most) == (4, 2)


def test_targets_skip_padding_and_other_documents():
    labels = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    found = Supervision.of(labels, 1, {"attention_mask": mask, "position_ids": positions})
    assert found.heads[0].rows.tolist() == [3, 6, 7]
    assert found.heads[0].targets.tolist() == [5, 8, 9]
    assert found.next_token.count == 10  # as in the model's own loss, which knows neither
    shared = Supervision.of(
        labels, 1, {"attention_mask": mask, "position_ids": positions[:1]}
    )  # one row of positions for the whole batch
    assert shared.heads[0].rows.tolist() == [3, 6]


def test_no_target_beyond_the_sequence():
    found = Supervision.of(torch.ones(2, 3, dtype=torch.long), 4)
    assert [len(head.rows) for head in found.heads] == [len(head.targets) for head in found.heads] == [2, 0, 0, 0]


def test_the_first_column_is_no_next_token():
    assert Supervision.of(torch.tensor([[1, 2, -100], [-100, 5, 6]]), 0).next_token.count == 3


def test_rows_equal_those_of_nonzero():
    """Drawn or not, on random batches, against one head at a time written plainly."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        labels = torch.randint(-1, 9, (3, 11), generator=generator)
        labels[labels < 0] = -100
        mask = torch.rand(3, 11, generator=generator) > 0.2
        for fraction, predicted in ((1.0, False), (0.4, False), (0.4, True)):
            found = Supervision.of(labels, 3, {"attention_mask": mask}, fraction, seed, draw_predicted=predicted)
            drawn = torch.rand(33, generator=torch.Generator().manual_seed(seed)) < fraction
            for k, head in enumerate(found.heads, start=2):
                plain = (labels[:, k:] != -100) & mask[:, k:] & mask[:, :-k]
                sequence, token = plain.nonzero(as_tuple=True)
                rows = sequence * 11 + token
                kept = drawn[rows + (k - 1 if predicted else 0)] if fraction < 1 else slice(None)
                torch.testing.assert_close(head.rows, rows[kept])
                torch.testing.assert_close(head.targets, labels.flatten()[rows[kept] + k])
                assert head.count == len(rows)
                assert head.most == torch.bincount(rows[kept] // 11, minlength=3).max()
