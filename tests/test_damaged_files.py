"""Damaged files end in an error of ours or in a right result: never in another library's error, a hang, half an artifact or wasted memory.

`peft_caft` is tried with a few seeds by default. A long run: ``DAMAGE_TRIES=300 pytest -m slow -s tests/test_damaged_files.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.basics.reading import read_json, read_yaml
from peft_caft.basics.run_folder import last_whole_checkpoint, random_states
from peft_caft.concepts.concepts import concepts
from peft_caft.concepts.settings import ConceptsSettings
from peft_caft.hub.import_caft_llm import import_heads
from peft_caft.hub.merging import merge

from .support.commands import peft_caft
from .support.damaged_commands import COMMANDS, Command, Workshop, attempt

QUICK = [command for command in COMMANDS if not command.slow]
NAMED = {command.name: command for command in COMMANDS}
TRIES = int(os.environ.get("DAMAGE_TRIES", "6"))  # of each command
FIRST = int(os.environ.get("DAMAGE_SEED", "0"))


# How the named cases are made


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Fields of a JSON file, set."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Another kind of file system entry of this name."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes())


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def bit_flipped(name: str, place: int) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 8
        (folder / name).write_bytes(data)

    return flip


DEEP = "[" * 100_000 + "]" * 100_000
ADAPTER, HEADS = "caft-model/adapter_config.json", "heads-model/config.json"
WEIGHTS = "caft-model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("damaged"), runs=False)


@pytest.mark.parametrize("command", QUICK, ids=lambda command: command.name)
def test_a_damaged_file_is_refused_in_our_words_or_does_no_harm(command: Command, workshop):
    for seed in range(2):
        kind, done, outcome = workshop.try_once(command, seed)
        assert outcome.kind != "failed", f"seed {seed}, {kind}, {done}: {outcome.text}"


SLOW_REGRESSIONS = {
    "an optimizer in the place of random states": (
        "train, resumed",
        copied("runs/train/checkpoints/checkpoint-2/scheduler.pt", "runs/train/checkpoints/checkpoint-2/optimizer.pt"),
        "checkpoint-2' cannot be loaded as a checkpoint",
    ),
    "a folder in the place of a cache's marks": (
        "train-heads, resumed", replaced("runs/cache/done.bin", Path.mkdir), "done.bin: expected a file"
    ),
    "another record in the place of a summary": (
        "compare, resumed",
        copied("model/config.json", "runs/compare/runs/lora/lr-0.001/seed-1/adapter/summary.json"),
        "a value has another kind than this command records",
    ),
    "rows of an evaluation that were changed": (
        "compare, resumed",
        bit_flipped("runs/compare/runs/lora/lr-0.001/seed-1/test/rows.jsonl", 300),
        "rows.jsonl: not what was written, by its hash in evaluation.json",
    ),
    "a pipe in the place of an evaluation's rows": (
        "compare, resumed",
        replaced("runs/compare/runs/lora/lr-0.001/seed-1/test/rows.jsonl", os.mkfifo),
        "rows.jsonl: expected a file",
    ),
    "a folder in the place of a record of data": (
        "compare, resumed", replaced("runs/compare/data/data.json", Path.mkdir), "data.json: expected a file"
    ),
    "nested JSON beside a model": (
        "distill (prompts, model)", written("model/generation_config.json", DEEP), "cannot be loaded as a "
    ),
    "a batch that is another row": (
        "distill, resumed",
        copied("files/prompts.jsonl", "runs/distill/.answers.jsonl.parts/part-0.jsonl"),
        "line 1: damaged, its sum does not agree",
    ),
}  # fmt: skip


@pytest.mark.slow
def test_runs_that_cannot_be_resumed_say_so(tmp_path):
    shop = Workshop(tmp_path, runs=True)
    for run in ("train", "heads"):  # what is whole is resumed from
        checkpoints = shop.folder / "runs" / run / "checkpoints"
        needed = (*random_states(1), "optimizer.pt", "scheduler.pt")
        assert last_whole_checkpoint(checkpoints, needed) == checkpoints / "checkpoint-2"
    for name, edit, message in SLOW_REGRESSIONS.values():
        command = NAMED[name]
        edit(shop.folder)
        outcome = attempt(lambda command=command: command.run(shop.folder))
        shop.restore(command)
        assert outcome.kind == "refused", f"{name}: {outcome.text}"
        assert re.search(message, outcome.text), outcome.text


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_damaged_files(tmp_path):
    shop = Workshop(tmp_path, runs=True)
    by_command: dict[str, Counter[str]] = {}
    by_damage: dict[str, Counter[str]] = {}
    failures = []
    for command in COMMANDS:
        for seed in range(FIRST, FIRST + TRIES):
            kind, done, outcome = shop.try_once(command, seed)
            by_command.setdefault(command.name, Counter())[outcome.kind] += 1
            by_damage.setdefault(kind, Counter())[outcome.kind] += 1
            if outcome.kind == "failed":
                failures.append(f"{command.name}, seed {seed}, {kind}: {done}: {outcome.text}")
    for title, table in (("command", by_command), ("damage", by_damage)):
        print(f"\n{title:32} refused  done  other  failed")
        for name, counts in sorted(table.items()):
            print(f"{name:32} {counts['refused']:7} {counts['done']:5} {counts['other']:6} {counts['failed']:7}")
    print(f"\n{len(COMMANDS) * TRIES} tries, {len(failures)} failed", *failures, sep="\n")
    assert not failures


# What failed once, by name

REGRESSIONS = {
    "nested JSON": ("inspect adapter", written("caft-model/caft_config.json", DEEP), "not valid JSON"),
    "a list for an object": ("CAFTConfig.from_pretrained", written(ADAPTER, "[]"), "got a list, expected a JSON object"),
    "no Unicode text": ("load_adapter", edited(ADAPTER, revision="\ud800"), "not valid JSON.*surrogate"),
    "a key twice": ("merge", written(ADAPTER, '{"r": 2, "r": 3}'), "'r' is there twice"),
    "UTF-16": ("compare (plan)", written("files/plan.yaml", "model: m".encode("utf-16")), "plan.yaml: not UTF-8"),
    "nested YAML": ("--training-yaml", written("files/training.yaml", "[" * 800 + "]" * 800), "not valid YAML"),
    "half a character": ("--training-yaml", written("files/training.yaml", r'seed: "\ud800"'), "not valid YAML.*surrogates"),
    "a tag of Python": ("--training-yaml", written("files/training.yaml", "seed: !!python/tuple [1]"), "not valid YAML"),
    "an option of another type": ("--training-yaml", written("files/training.yaml", "seed: [1]"), "seed: got .1., expected a whole"),
    "an unknown optimizer": ("--training-yaml", written("files/training.yaml", "optim: sdg"), "training options: sdg is not"),
    "a billion heads": ("AuxiliaryHeads.from_pretrained", edited(HEADS, num_heads=10**9), "num_heads: got 1,000,000,000"),
    "a billion layers": ("inspect heads", edited(HEADS, head_num_layers=10**9), "expected at most 1,000 blocks"),
    "more heads than tensors": ("inspect heads", edited(HEADS, num_heads=400, weights_sha256=None), "lacks 'heads.10.0'"),
    "a rank of a billion": ("load_adapter", edited(ADAPTER, r=10**9), "r: got 1000000000 in .*, expected at most 32"),
    "an alpha that is no number": ("inspect adapter", edited(ADAPTER, lora_alpha="1e5"), "lora_alpha: got '1e5', expected"),
    "an alpha that is nothing": ("load_adapter beside another", edited(ADAPTER, lora_alpha=None), "lora_alpha: got None"),
    "a weight that is no number": (
        "load_adapter", edited("caft-model/caft_config.json", aux_loss_weight="x"), "aux_loss_weight: got 'x', expected a number"
    ),
    "a record of another kind": ("inspect heads", edited(HEADS, training={"steps": "x", "learning_rate": []}), "training: a value"),
    "heads for an adapter": ("load_adapter", copied("heads-model/model.safetensors", WEIGHTS), "was made for another model"),
    "another adapter's weights": ("merge", copied("lora-model/adapter_model.safetensors", WEIGHTS), "expected nothing"),
    "a model for heads": (
        "AuxiliaryHeads.from_pretrained",
        both(copied("model/model.safetensors", "heads-model/model.safetensors"), edited(HEADS, weights_sha256=None)),
        "lacks 'heads.0.0', expected 2 heads of 1 blocks",
    ),
    "random weights where tensors lack": (
        "merge (model)", lambda folder: lacking(folder / "model" / "model.safetensors"), "model: .* lacks 1 tensor.* random numbers"
    ),
    "heads that are a number": (
        "inspect adapter", edited("caft-model/caft_config.json", heads=2), "caft_config.json: heads: got 2, expected a text"
    ),
    "a tokenizer that loads and does not run": (
        "merge (model)", edited("model/tokenizer_config.json", model_max_length={}), "cannot be loaded as a tokenizer"
    ),
    "a damaged tokenizer": ("merge (model)", written("model/tokenizer.json", "{}"), "cannot be loaded as a tokenizer"),
    "a pipe": ("load_adapter", replaced(WEIGHTS, os.mkfifo), "adapter_model.safetensors: expected a file, got"),
    "a link to itself": ("inspect adapter", replaced(ADAPTER, lambda path: path.symlink_to(path.name)), "expected a file, got"),
    "a broken link beside an adapter": (
        "inspect adapter", replaced("caft-model/caft_config.json", lambda path: path.symlink_to("nowhere")), "expected a file, got"
    ),
    "a flipped bit in an archive": (
        "import-heads", bit_flipped("authors/heads_residual.pth", 2496), "damaged, the sum of .* does not agree"
    ),
    "a configuration that transformers refuses": (
        "plan (config.json)", edited("model/config.json", mlp_bias=0), "cannot be loaded as the configuration of a model .*mlp_bias"
    ),
}  # fmt: skip


def lacking(path: Path) -> None:
    """A safetensors file of a model without one of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", REGRESSIONS)
def test_it_is_refused_by_name(case, workshop):
    name, edit, message = REGRESSIONS[case]
    command = NAMED[name]
    try:
        edit(workshop.folder)
        outcome = attempt(lambda: command.run(workshop.folder))
    finally:
        workshop.restore(command)
    assert outcome.kind == "refused", outcome.text
    assert re.search(message, outcome.text), outcome.text


@pytest.mark.parametrize("name", [ADAPTER, HEADS, "files/plan.yaml", "files/training.yaml"])
def test_a_byte_order_mark_does_no_harm(name, tmp_path, workshop):
    path = tmp_path / Path(name).name
    path.write_bytes(b"\xef\xbb\xbf" + (workshop.folder / name).read_bytes())
    read = read_yaml if path.suffix == ".yaml" else read_json
    assert read(path) == read(workshop.folder / name)


ODD_NAME = "ein Ordner \U0001f642 \u202eabc e\u0301 'x' %s"


def test_names_with_spaces_and_odd_characters_do_no_harm(workshop, tmp_path):
    folder = tmp_path / ODD_NAME
    for name in ("model", "heads-model", "caft-model", "files", "authors"):
        shutil.copytree(workshop.folder / name, folder / name)
    edited(ADAPTER, base_model_name_or_path=str(folder / "model"))(folder)
    edited("caft-model/caft_config.json", heads=str(folder / "heads-model"))(folder)
    for name in ("inspect heads --model", "AuxiliaryHeads.from_pretrained", "load_adapter", "merge", "import-heads"):
        outcome = attempt(lambda command=NAMED[name]: command.run(folder))
        assert outcome.kind == "done", f"{name}: {outcome.text}"
        shutil.rmtree(folder / "fresh", ignore_errors=True)
    assert "yes" in peft_caft("inspect", str(folder / "caft-model"), "--model", str(folder / "model"))


def test_a_command_shows_a_damaged_file_in_one_message(workshop):
    command = NAMED["inspect adapter"]
    try:
        written(ADAPTER, DEEP)(workshop.folder)
        output = peft_caft("inspect", str(workshop.folder / "caft-model"), expect=1)
    finally:
        workshop.restore(command)
    assert output.startswith("Error: ")
    assert "adapter_config.json: not valid JSON" in output
    assert "Traceback" not in output.replace("PEFT_CAFT_TRACEBACK", "")


def test_a_file_too_large_to_be_a_configuration_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)  # a sparse file, which takes no room
    with pytest.raises(ValueError, match=r"config.json: got 1,099,511,627,776 bytes, expected at most"):
        read_json(tmp_path / "config.json")


def test_a_second_adapter_that_is_refused_leaves_the_model_as_it_was(workshop):
    from peft import get_peft_model

    from peft_caft import load_adapter

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(workshop.folder / "model"),
        CAFTConfig(heads=str(workshop.folder / "heads-model"), num_auxiliary_heads=2, r=2, target_modules=["q_proj"]),
    )
    names = {name for name, _ in model.named_parameters()}
    command = NAMED["load_adapter beside another"]
    try:
        copied("heads-model/model.safetensors", WEIGHTS)(workshop.folder)
        with pytest.raises(ValueError, match="was made for another model"):
            load_adapter(model, workshop.folder / "caft-model", "second")
    finally:
        workshop.restore(command)
    assert {name for name, _ in model.named_parameters()} == names
    assert list(model.peft_config) == ["default"]


# Outputs


def writers(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What writes an artifact into a new folder."""
    model = str(folder / "model")
    heads = AuxiliaryHeads.from_base_model(AutoModelForCausalLM.from_pretrained(model), 4)
    return {
        "save_pretrained": heads.save_pretrained,
        "merge": lambda output: merge(str(folder / "caft-model"), str(output), model),
        "import-heads": lambda output: import_heads(
            str(folder / "authors" / "heads_decoder.pth"), str(folder / "authors" / "base"), str(output)
        ),
        "concepts": lambda output: concepts(
            ConceptsSettings(str(folder / "files" / "data.jsonl"), model, str(output), loss=False, plots=False)
        ),
    }


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_is_half_written(workshop, small_disk):
    for name, write in writers(workshop.folder).items():
        outcome = attempt(lambda write=write, name=name: write(small_disk / name))
        assert outcome.kind == "refused", f"{name}: {outcome.text}"
        assert "is full" in outcome.text, name
        left = [path.name for path in small_disk.rglob("*") if path.is_file()]
        assert not left, f"{name} left {left}"


def test_a_folder_that_cannot_be_written_is_named(workshop, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name, write in writers(workshop.folder).items():
        outcome = attempt(lambda write=write: write(small_disk / "output"))
        assert outcome.kind == "refused", f"{name}: {outcome.text}"
        assert "cannot be written (Read-only file system)" in outcome.text, name


def test_a_file_in_the_place_of_a_folder_is_named(workshop, tmp_path):
    (tmp_path / "file").write_text("")
    for name, write in writers(workshop.folder).items():
        outcome = attempt(lambda write=write: write(tmp_path / "file" / "output"))
        assert outcome.kind == "refused", f"{name}: {outcome.text}"
        assert re.search(r"cannot be written \((Not a directory|File exists)\)", outcome.text), outcome.text
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, workshop, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workshop.folder / "model")
    heads = AuxiliaryHeads.from_base_model(model, 2, "residual")
    with torch.no_grad():
        next(heads.parameters())[0, 0] = value
    heads.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'heads\.0\.0\.linear\.weight' holds infinite values or NaN"):
        AuxiliaryHeads.from_pretrained(tmp_path, model)
