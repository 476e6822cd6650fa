"""Files are whole or not there."""

from __future__ import annotations

import pytest

from peft_caft.basics.files import filling, replacing


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
