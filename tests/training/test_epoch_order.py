"""The order of training rows: every row once, in batches of about one length, the same again after an interruption."""

from __future__ import annotations

import itertools

import pytest

from peft_caft.training.epoch_order import EpochOrder

LENGTHS = [3 + (index * 37) % 101 for index in range(1003)]


def order(epoch: int = 0, batch_size: int = 8, lengths: list[int] | None = LENGTHS, rows: int = 1003) -> list[int]:
    return list(EpochOrder(lengths, rows, batch_size, seed=5, epoch=lambda: epoch))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batch_size", [1, 8, 1003, 2000])
def test_every_row_comes_once(lengths, batch_size):
    assert sorted(order(batch_size=batch_size, lengths=lengths)) == list(range(1003))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_has_one_order_and_every_epoch_its_own(lengths):
    assert order(1, lengths=lengths) == order(1, lengths=lengths) != order(2, lengths=lengths)


def test_a_batch_holds_rows_of_about_one_length_and_the_longest_come_first():
    lengths = [LENGTHS[index] for index in order()]
    batches = [lengths[i : i + 8] for i in range(0, 1003, 8)]
    assert max(LENGTHS) in batches[0]
    assert sum(max(b) - min(b) for b in batches[1:-1]) / len(batches) < 10  # of a range of a hundred


def test_batches_do_not_run_from_long_to_short():
    means = [sum(LENGTHS[i] for i in order()[start : start + 8]) for start in range(0, 1000, 8)]
    falls = sum(after < before for before, after in itertools.pairwise(means))
    assert 0.35 < falls / (len(means) - 2) < 0.65
