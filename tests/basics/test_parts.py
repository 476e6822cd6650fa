"""Finished batches of an interrupted run: what was written is read, or refused."""

from __future__ import annotations

import pytest

from peft_caft.basics.parts import Parts

BATCH = {"batch": 3, "seconds": 0.125, "results": [{"answer": "\U0001f642 é", "losses": [0.1, 1e-300]}]}


@pytest.fixture
def parts(tmp_path) -> Parts:
    parts = Parts(tmp_path / "answers.jsonl")
    parts.begin({"seed": 1})
    with parts.appending(0) as append:
        append(BATCH)
        append(BATCH | {"batch": 4})
    return parts


def test_batches_are_read_as_they_were_written(parts):
    assert list(parts.finished()) == [BATCH, BATCH | {"batch": 4}]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"0.125", b"0.126"), (b'"seconds"', b'"secondz"'), (b"1e-300", b"NaN"), (b'"batch": 4', b'"batch": 3'), (b"{", b"")],
)  # fmt: skip
def test_a_changed_batch_is_refused(parts, old, new):
    path = parts.folder / "part-0.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=r"part-0.jsonl, line [12]: .*--overwrite"):
        list(parts.finished())


def test_a_folder_in_the_place_of_batches_is_refused(parts):
    (parts.folder / "part-1.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"part-1\.jsonl: expected a file"):
        parts.begin({"seed": 1})


def test_a_batch_that_is_there_twice_is_refused(parts):
    path = parts.folder / "part-0.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"line 3: batch 3 is there twice"):
        list(parts.finished())


def test_batches_of_another_output_are_refused(parts, tmp_path):
    other = Parts(tmp_path / "other.jsonl")
    other.begin({"seed": 1})
    (other.folder / "part-0.jsonl").write_bytes((parts.folder / "part-0.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"line 1: damaged, its sum does not agree"):
        list(other.finished())
