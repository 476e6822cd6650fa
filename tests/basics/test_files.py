"""Files are whole or not there."""

from __future__ import annotations

import subprocess
import sys
from signal import SIGKILL

import pytest

from peft_caft.basics import files
from peft_caft.basics.files import filling, new_folder, replacing


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


KILLED = """
import os, signal, sys
from peft_caft.basics import files
with getattr(files, sys.argv[1])(sys.argv[2]) as temporary:
    if sys.argv[1] == "new_folder":
        temporary.mkdir()
    (temporary if sys.argv[1] == "replacing" else temporary / "name").write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("writer", ["replacing", "filling", "new_folder"])
def test_next_write_removes_what_killed_ones_left_and_nothing_else(writer, tmp_path):
    target = tmp_path / "a[1].b"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, writer, str(target)]).returncode == -SIGKILL
    assert not target.is_file()
    assert len(list(tmp_path.glob(".*"))) == 1, "the second removed what the first left"
    for name in (".a[1].b.notes.tmp", ".a1.b.12345678.tmp"):
        (tmp_path / name).touch()
    with getattr(files, writer)(target) as temporary:
        if writer == "new_folder":
            temporary.mkdir()
        (temporary if writer == "replacing" else temporary / "name").write_text("new")
    assert (target if writer == "replacing" else target / "name").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {target.name, ".a[1].b.notes.tmp", ".a1.b.12345678.tmp"}


@pytest.mark.parametrize("writer", [replacing, filling, new_folder])
def test_error_of_reading_inside_is_not_taken_for_one_of_writing(writer, tmp_path):
    with pytest.raises(FileNotFoundError) as caught, writer(tmp_path / "target"):
        (tmp_path / "absent").read_text()
    assert caught.value.filename == str(tmp_path / "absent")
    assert not list(tmp_path.iterdir()) or writer is filling  # which makes its folder first, to see that it may


@pytest.mark.parametrize("writer", [replacing, filling, new_folder])
def test_place_that_cannot_be_written_is_named(writer, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"output: .*file/target cannot be written"),
        writer(tmp_path / "file" / "target"),
    ):
        pass


@pytest.mark.parametrize("writer", [replacing, filling])
def test_two_that_write_the_same_at_once_both_end(writer, tmp_path):
    target = tmp_path / "target"

    def write(temporary, text: str) -> None:
        (temporary if writer is replacing else temporary / "name").write_text(text)

    with writer(target) as first:
        write(first, "first")
        with writer(target) as second:
            write(second, "second")
    assert (target if writer is replacing else target / "name").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
