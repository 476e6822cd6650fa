"""The identity of what a folder holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from peft_caft.basics.contents import contents_of
from peft_caft.basics.provenance import weights_digest

from ..support.tiny_checkpoint import save_checkpoint, tiny_llama


def flip_last_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model.safetensors", "model_weights_sha256"),
        ("config.json", "model_files_sha256"),
        ("tokenizer.json", "model_files_sha256"),
        ("chat_template.jinja", "model_files_sha256"),
    ],
)
def test_every_byte_that_is_read_counts(name, changed, tmp_path):
    save_checkpoint(tmp_path / "model")
    before = contents_of("model", str(tmp_path / "model"))
    flip_last_byte(tmp_path / "model" / name)
    after = contents_of("model", str(tmp_path / "model"))
    assert before.keys() == after.keys() == {"model_weights_sha256", "model_files_sha256"}
    assert [key for key in before if before[key] != after[key]] == [changed]


def test_names_of_folders_cards_and_times_do_not_count(tmp_path):
    save_checkpoint(tmp_path / "model")
    before = contents_of("model", str(tmp_path / "model"))
    os.rename(tmp_path / "model", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("a card")
    (tmp_path / "moved" / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    os.utime(tmp_path / "moved" / "model.safetensors", (0, 0))
    assert contents_of("model", str(tmp_path / "moved")) == before


def test_nothing_has_no_contents():
    assert contents_of("heads", None) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./hedas", "heads: './hedas' is neither a folder nor a Hub repository id"),
        ("org/never-loaded", "heads: 'org/never-loaded', revision main, is not in the local cache"),
        ("a/b/c", "heads: 'a/b/c' is neither a folder"),
    ],
)
def test_what_is_not_there_is_refused_by_name(source, message):
    """Otherwise a run would be resumed with whatever lies there later."""
    with pytest.raises(FileNotFoundError, match=message):
        contents_of("init_heads", source, field="heads")


def test_one_row_of_an_embedding_changes_the_digest_of_a_model():
    model = tiny_llama()
    before = weights_digest(model)
    model.get_input_embeddings().weight.data[7, 3] += 1e-3
    assert weights_digest(model) != before
    assert weights_digest(model.to(torch.bfloat16)) != before
