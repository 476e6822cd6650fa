"""DeepSpeed's ZeRO in two processes, on the CPU with gloo, against one process without it: `make test-optional` has what it needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from peft_caft.heads.config import HEAD_TYPES

from ..support.processes import finish, in_one_process, kill_when, start
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, write_chats
from . import test_stage1_processes as stage_1
from . import test_stage2_processes as stage_2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="see `make test-optional`"),
]
ZERO = pytest.mark.parametrize("zero", ["zero2", "zero3"])
# ZeRO-3 leaves parameters whole that are smaller than this: 320 x 320 is the least that it partitions.
PERSISTENCE_THRESHOLD = 100_000
SIZES = {"hidden_size": 320, "vocab_size": 320, "intermediate_size": 320, "num_key_value_heads": 4}
RANK = 320
# ZeRO-3 loads a model in the dtype that it trains in; the others take it as it is.
BF16 = {"zero2": (), "zero3": ("--bf16", "true")}


def large_llama(folder: Path, **changes) -> str:
    return save_checkpoint(folder, **SIZES | {"initializer_range": 0.03} | changes)


def test_matrices_are_large_enough_to_be_partitioned():
    small = [p.numel() for p in tiny_llama(**SIZES).parameters() if p.dim() > 1 and p.numel() <= PERSISTENCE_THRESHOLD]
    assert not small
    assert RANK * SIZES["hidden_size"] > PERSISTENCE_THRESHOLD


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return stage_2.with_data_and_heads(large_llama(folder / "model"), folder)


def states_of(checkpoint: Path) -> set[str]:
    """Names of the parameters that DeepSpeed has written as such; the trained ones are among the optimizer's states too."""
    (folder,) = checkpoint.glob("global_step*")
    paths = [path for path in folder.iterdir() if path.name.endswith("model_states.pt")]
    assert paths
    return {name for path in paths for name in torch.load(path, weights_only=False)["module"]}


@ZERO
@pytest.mark.parametrize(
    "options",
    [
        ("--head-type", "decoder_layer", "--targets", "soft"),
        ("--head-type", "residual", "--targets", "hard"),
        ("--head-input", "last_hidden_state", "--dtype", "bfloat16", "--max_steps", "8"),
    ],
    ids=["soft", "hard", "bf16-tied"],
)
def test_stage_1_trains_as_one_process_does_and_is_taken_up_when_killed(options, zero, files, tmp_path):
    half = "bfloat16" in options
    if half:
        files = files | {"model": large_llama(tmp_path / "tied", tie_word_embeddings=True)}
    in_one_process(stage_1.command(files, tmp_path / "one", "--per_device_train_batch_size", "12", *options))
    options = (*options, *(BF16[zero] if half else ()), "--per_device_train_batch_size", "6")
    arguments = stage_1.command(files, tmp_path / "two", *options)
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-4"
    kill_when((checkpoint / "trainer_state.json").exists, start(f"{zero}.yaml", arguments))
    # Not the frozen base model; of a tied weight DeepSpeed overlooks the second name.
    assert {n for n in states_of(checkpoint) if not n.startswith("heads.")} == (
        {"base.lm_head.weight"} if half else set()
    )
    output = finish(start(f"{zero}.yaml", arguments))
    assert output.count("Heads written to") == 1
    stage_1.require_same_training(tmp_path / "one", tmp_path / "two", tolerance=2e-2 if half else 1e-5)


def test_zero2_fills_a_cache_and_is_taken_up_when_killed(files, tmp_path):
    arguments = stage_1.command(files, tmp_path / "one", "--per_device_train_batch_size", "12")
    in_one_process(arguments)
    options = ("--cache", str(tmp_path / "cache"), "--per_device_train_batch_size", "6")
    arguments = stage_1.command(files, tmp_path / "two", *options)
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-4"
    kill_when((checkpoint / "trainer_state.json").exists, start("zero2.yaml", arguments))
    output = finish(start("zero2.yaml", arguments))
    assert "Caching hidden states" not in output
    stage_1.require_same_training(tmp_path / "one", tmp_path / "two", tolerance=1e-5)


def test_stage_1_refuses_a_cache_for_partitioned_models(files, tmp_path):
    arguments = stage_1.command(files, tmp_path / "heads", "--cache", str(tmp_path / "cache"))
    output, _ = start("zero3.yaml", arguments).communicate(timeout=120)
    assert f"cache: got '{tmp_path / 'cache'}' with a sharded model, expected none" in output


@ZERO
@pytest.mark.parametrize("mode", stage_2.MODES)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_stage_2_trains_as_one_process_does_and_is_taken_up_when_killed(head_type, mode, zero, files, tmp_path):
    accumulation = ("--gradient_accumulation_steps", "2") if mode == "lora" else ()
    options = ("--r", str(RANK), "--train-heads", *stage_2.MODES[mode], *accumulation, "--per_device_train_batch_size")
    in_one_process(stage_2.command(files, tmp_path / "one", head_type, *options, "8"))
    two = stage_2.command(files, tmp_path / "two", head_type, *options, "4")
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-3"
    kill_when((checkpoint / "trainer_state.json").exists, start(f"{zero}.yaml", two))
    finish(start(f"{zero}.yaml", two))
    stage_2.require_same_training(tmp_path / "one", tmp_path / "two")
    if mode != "frozen":
        stage_2.require_same_heads(files[head_type], tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("zero", "mode"), [("zero2", mode) for mode in stage_2.WHOLE] + [("zero3", "whole model but the unembedding")]
)
def test_whole_model_trains_as_in_one_process_and_is_taken_up_when_killed(zero, mode, files, tmp_path):
    stage_2.train_whole_model(files, tmp_path, mode, f"{zero}.yaml")


def test_trained_unembedding_in_parts_is_refused(files, tmp_path):
    arguments = stage_2.command(files, tmp_path / "out", "residual", "--train-heads", *stage_2.WHOLE["whole model"])
    output, _ = start("zero3.yaml", arguments).communicate(timeout=120)
    assert "freeze_unembedding: got false" in output


@ZERO
def test_stage_2_of_a_model_in_half_precision(zero, tmp_path):
    files = {"model": large_llama(tmp_path / "model"), "data": write_chats(tmp_path / "data.jsonl", 160)}
    options = ("--dtype", "bfloat16", "--r", str(RANK), "--per_device_train_batch_size")
    in_one_process(stage_2.command(files, tmp_path / "one", None, *options, "8"))
    finish(start(f"{zero}.yaml", stage_2.command(files, tmp_path / "two", None, *options, "4", *BF16[zero])))
    stage_2.require_same_training(tmp_path / "one", tmp_path / "two", tolerance=2e-2)


def test_another_dtype_than_deepspeeds_is_refused(files, tmp_path):
    arguments = stage_2.command(files, tmp_path, None, "--dtype", "bfloat16")
    output, _ = start("zero3.yaml", arguments).communicate(timeout=120)
    assert "dtype: got float32, expected bfloat16" in output
