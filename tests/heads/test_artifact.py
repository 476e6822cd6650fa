"""Heads on disk: exact round trips, refusals that say what to do, and saves that are cut off anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.config import fingerprint

from ..support.tiny_checkpoint import tiny_llama
from ..support.tiny_models import tiny_model, tokens

HEAD_TYPES = ("residual", "decoder_layer")


@cache
def base():
    """For tests that leave the model as it is."""
    return tiny_model("llama")


def made(seed: int, head_type: str = "residual", num_heads: int = 3) -> AuxiliaryHeads:
    heads = AuxiliaryHeads.from_base_model(base(), num_heads, head_type)
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return heads


def saved(folder: Path, **kwargs) -> Path:
    made(1, **kwargs).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_round_trip_is_exact(head_type, tmp_path):
    heads = made(1, head_type)
    heads.save_pretrained(tmp_path)
    loaded = AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())
    assert loaded.config == heads.config
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in heads.state_dict().items())
    for got, wanted in zip(loaded.logits(base(), tokens()), heads.logits(base(), tokens()), strict=True):
        assert torch.equal(got, wanted)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_heads_take_the_dtype_of_the_base_model(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    loaded = AuxiliaryHeads.from_pretrained(saved(tmp_path), base_model=model)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, tensor in made(1).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16))


def test_config_json_says_what_the_heads_are(tmp_path):
    weights = saved(tmp_path) / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config.pop("unembedding_fingerprint")) == 16
    assert config == {
        "format_version": 1,
        "head_type": "residual",
        "head_input": "last_layer_input",
        "final_norm": True,
        "residual_bias": False,
        "num_heads": 3,
        "head_num_layers": 1,
        "hidden_size": 32,
        "vocab_size": 97,
        "base_model_name_or_path": None,
        "base_model_revision": None,
        "base_model_class": "LlamaForCausalLM",
        "license": None,
        "training": {},
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def test_fingerprint_survives_rounding_and_tells_models_apart():
    weight = base().lm_head.weight
    exact = torch.tensor(fingerprint(weight))
    for dtype in (torch.bfloat16, torch.float16):
        assert (torch.tensor(fingerprint(weight.to(dtype))) - exact).abs().max() < 0.01
    assert (torch.tensor(fingerprint(tiny_model("llama", seed=1).lm_head.weight)) - exact).abs().max() > 0.5


def test_fewer_heads_than_saved_takes_the_first(tmp_path):
    config = CAFTConfig(heads=str(saved(tmp_path)), num_auxiliary_heads=2, target_modules="all-linear")
    model = get_peft_model(tiny_model("llama"), config)
    heads = model.auxiliary_heads["default"].heads
    assert len(heads) == 2
    assert torch.equal(heads[1][0].linear.weight, made(1).heads[1][0].linear.weight)


def test_more_heads_than_saved_is_refused(tmp_path):
    config = CAFTConfig(heads=str(saved(tmp_path)), num_auxiliary_heads=4, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"num_auxiliary_heads: got 4, expected at most 3.*num_auxiliary_heads=3"):
        get_peft_model(tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (lambda: tiny_llama(hidden_size=64, vocab_size=97), "hidden_size: got 64 in the base model, expected 32"),
        (lambda: tiny_llama(vocab_size=15), "vocab_size: got 15 in the base model, 97 in the heads"),
        (lambda: tiny_llama(vocab_size=100), "unembedding_fingerprint: got"),
        (lambda: tiny_model("llama", seed=1), "unembedding_fingerprint: got"),
    ],
    ids=["hidden_size", "vocab_size", "other vocabulary", "fingerprint"],
)
def test_heads_of_another_base_model_are_refused(model, field, tmp_path):
    with pytest.raises(ValueError, match=field) as error:
        AuxiliaryHeads.from_pretrained(saved(tmp_path), base_model=model())
    assert "train heads for this one" in str(error.value)


def test_folder_without_heads_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*train-heads"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_folder_of_a_model_is_refused(tmp_path):
    base().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"got the configuration of a whole model \(llama\), expected that of auxiliary heads.*push_to_hub",
    ):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


@pytest.mark.parametrize("name", ["missing/folder/of/heads", "no such folder"])
def test_path_that_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository id"):
        AuxiliaryHeads.from_pretrained(name, base_model=base())


def test_repository_that_is_not_in_the_cache_is_named_offline(tmp_path):
    with pytest.raises(FileNotFoundError, match="org/heads"):
        AuxiliaryHeads.from_pretrained("org/heads", base_model=base(), local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights_are_refused(keep, tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_flipped_bit_is_refused(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged.*sha256"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_truncated_weights_without_recorded_hash_are_refused(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    edit_config(tmp_path, weights_sha256=None)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or truncated"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_type": "transformer"}, "head_type: got 'transformer', expected one of 'residual', 'decoder_layer'"),
        ({"head_input": "embeddings"}, "head_input: got 'embeddings', expected one of"),
        ({"format_version": 99}, "format_version: got 99, expected 1"),
        ({"num_heads": 0}, "num_heads: got 0, expected"),
        ({"num_heads": 2}, r"holds 'heads.2.0', expected 2 heads of 1 blocks"),
        ({"colour": "blue"}, r"unknown field\(s\) colour"),
    ],
)
def test_configuration_that_cannot_be_right_is_refused(changes, message, tmp_path):
    edit_config(saved(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_fingerprint_of_another_length_is_refused_by_name(tmp_path):
    edit_config(saved(tmp_path), unembedding_fingerprint=[0.1, 0.2])
    with pytest.raises(ValueError, match="unembedding_fingerprint: got 2"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_configuration_that_is_no_json_is_refused(tmp_path):
    (saved(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        made(1).save_pretrained(tmp_path / "file")


EVALUATION = {
    "name": "answers",
    "file": "answers.jsonl",
    "sha256": "ab" * 32,
    "rows": 1200,
    "before": {
        "heads": [
            {"tokens_ahead": k, "cross_entropy": 6.0, "top1": 0.05, "top5": 0.1, "tokens": 9} for k in (2, 3, 4)
        ],
        "acceptance_length": 0.05,
    },
    "after": {
        "heads": [
            {"tokens_ahead": k, "cross_entropy": 4.0, "top1": 0.25, "top5": 0.5, "tokens": 9} for k in (2, 3, 4)
        ],
        "acceptance_length": 0.31,
    },
}


def test_card_shows_figures_and_plot_of_these_heads_alone(tmp_path):
    heads = made(1)
    heads.config.training = {
        "evaluations": [EVALUATION, EVALUATION | {"name": "code"}],
        "steps": 7,
        "versions": {"torch": "2"},
    }
    heads.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "**answers**: `answers.jsonl`, 1,200 rows",
        "**code**",
        "6.000 -> 4.000",
        "0.05 -> 0.31",
        "](heads.png)",
    ):
        assert text in card
    assert "not trained" not in card
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    made(2).save_pretrained(tmp_path)  # fresh heads in the same folder: nothing may speak of the old ones
    card = (tmp_path / "README.md").read_text()
    assert "**not trained**" in card
    assert "heads.png" not in card
    assert not (tmp_path / "heads.png").exists()


@pytest.mark.parametrize(
    "training",
    [
        {"imported_from": "heads.pth", "source": {"package": "x"}},
        {"evaluations": [{"name": "only after", "after": EVALUATION["after"]}]},
        {"evaluations": None, "data": "text.jsonl, 40 rows", "targets": "hard"},
        {"learning_rate": 1e-3, "data": [{"file": "text.jsonl", "provenance": {"model": "org/model", "seed": 3}}]},
    ],
)
def test_card_copes_with_heads_made_elsewhere(training, tmp_path):
    heads = made(1)
    heads.config.training = training
    heads.save_pretrained(tmp_path)
    assert "## Training" in (tmp_path / "README.md").read_text()


def test_pending_configuration_of_another_version_does_not_block_a_save(tmp_path):
    pending = saved(tmp_path) / ".config.json.pending"
    pending.write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"format_version": 99}))
    made(2).save_pretrained(tmp_path)
    assert equal(AuxiliaryHeads.from_pretrained(tmp_path, base_model=base()), made(2))


class CutOff(BaseException):
    """Stands for the process being killed: nothing in the package catches it."""


def cut_off_at(call: int, monkeypatch) -> None:
    """End the process's life just before its ``call``-th write or rename reaches the disk."""
    counter = iter(range(1000))

    def dying(function):
        def wrapped(*args, **kwargs):
            if next(counter) >= call:
                raise CutOff
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


CALLS = 16  # writes and renames of a save over other heads


def equal(first: AuxiliaryHeads, second: AuxiliaryHeads) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture(scope="module")
def old_heads(tmp_path_factory) -> tuple[AuxiliaryHeads, Path]:
    """Heads with figures, and the folder that they were saved to."""
    old, folder = made(1), tmp_path_factory.mktemp("old")
    figures = {"heads": [{"tokens_ahead": 2, "cross_entropy": 9.0, "top1": 0.1, "top5": 0.2, "tokens": 3}]}
    evaluation = {
        "name": "old",
        "before": figures | {"acceptance_length": 0.1},
        "after": figures | {"acceptance_length": 0.1},
    }
    old.config.training = {"evaluations": [evaluation]}
    old.save_pretrained(folder)
    assert "9.000" in (folder / "README.md").read_text()
    return old, folder


@pytest.mark.parametrize("call", range(CALLS + 1))
def test_save_that_is_cut_off_leaves_the_old_or_the_new_heads_whole(call, old_heads, tmp_path, monkeypatch):
    (old, folder), new = old_heads, made(2)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        cut_off_at(call, patch)
        try:
            new.save_pretrained(tmp_path)
            finished = True
        except CutOff:
            finished = False
    loaded = AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())
    matches = [equal(loaded, heads) for heads in (old, new)]
    assert any(matches)
    if call == 0:
        assert matches[0]
    assert finished == (call == CALLS), "CALLS is the number of steps that a save takes"
    if finished:
        assert matches[1]
    card = tmp_path / "README.md"
    if matches[1] and card.exists():
        assert "9.000" not in card.read_text(), "the old card would describe the new heads"
    new.save_pretrained(tmp_path)  # and the next save works
    assert AuxiliaryHeads.from_pretrained(tmp_path, base_model=base()).config == new.config


@pytest.mark.parametrize("call", range(CALLS))
def test_first_save_that_is_cut_off_leaves_nothing_or_the_heads(call, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, suppress(CutOff):
        cut_off_at(call, patch)
        made(1).save_pretrained(tmp_path)
    if (tmp_path / "model.safetensors").exists():
        assert equal(AuxiliaryHeads.from_pretrained(tmp_path, base_model=base()), made(1))
    else:
        with pytest.raises(FileNotFoundError):
            AuxiliaryHeads.from_pretrained(tmp_path, base_model=base())


@pytest.mark.slow
def test_two_saves_cut_off_one_after_the_other_leave_heads_whole(tmp_path, monkeypatch):
    versions = [made(seed) for seed in (1, 2, 3)]
    lost = []
    for first in range(CALLS + 1):
        for second in range(CALLS + 1):
            folder = tmp_path / f"{first}-{second}"
            versions[0].save_pretrained(folder)
            for call, heads in zip((first, second), versions[1:], strict=True):
                with monkeypatch.context() as patch, suppress(CutOff):
                    cut_off_at(call, patch)
                    heads.save_pretrained(folder)
            try:
                loaded = AuxiliaryHeads.from_pretrained(folder, base_model=base())
            except ValueError:
                lost.append((first, second))
            else:
                assert any(equal(loaded, heads) for heads in versions)
    assert not lost


def test_record_that_no_card_can_show_does_not_keep_heads_from_loading(tmp_path):
    edit_config(saved(tmp_path), training={"steps": "x", "learning_rate": []})
    heads = AuxiliaryHeads.from_pretrained(tmp_path, base())
    assert heads.config.training["steps"] == "x"
    with pytest.raises(
        ValueError, match=r"config.json: training: a value has another kind than `peft-caft train-heads`"
    ):
        heads.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
