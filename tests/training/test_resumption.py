"""The order of training rows: every row once, in batches of about one length, the same again after an interruption.

And what else a resumed run has as an unbroken one: its steps, and the seconds of all its parts.
"""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from transformers import TrainingArguments

from peft_caft.training.data import collator
from peft_caft.training.fine_tuning import fine_tune
from peft_caft.training.head_training import train_heads
from peft_caft.training.resumption import EpochOrder, ResumableTrainer, settings_of_run
from peft_caft.training.settings import FineTuningSettings, HeadTrainingSettings

from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer, write_chats

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


def trained(folder, resume_from=None, by_length=False, **changes) -> ResumableTrainer:
    args = {"save_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **changes}
    ids = torch.arange(2, 10).tolist()
    rows = (
        [{"input_ids": ids[: 3 + i % 6], "labels": ids[: 3 + i % 6]} for i in range(40)]
        if by_length
        else [{"input_ids": ids, "labels": ids}] * 40
    )
    model = tiny_llama(attention_dropout=0.5)
    trainer = ResumableTrainer(
        model,
        TrainingArguments(folder, **args),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=collator(tiny_tokenizer()),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


@pytest.mark.parametrize("arguments", [{"max_steps": 3}, {"max_steps": 7}, {"num_train_epochs": 1}])
def test_run_interrupted_after_its_last_step_takes_no_further_one(arguments, tmp_path):
    """Of five steps in an epoch."""
    unbroken = trained(tmp_path, **arguments)
    steps = unbroken.state.max_steps
    resumed = trained(tmp_path, str(tmp_path / f"checkpoint-{steps}"), **arguments)
    assert resumed.state.global_step == steps
    expected = unbroken.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())
    assert not (tmp_path / f"checkpoint-{steps + 1}").exists()


@pytest.mark.parametrize("arguments", [{"num_train_epochs": 2}, {"max_steps": 7}])
def test_checkpoint_at_the_end_of_an_epoch_holds_its_evaluation(arguments, tmp_path):
    unbroken = trained(tmp_path, eval_strategy="epoch", **arguments)
    for step in (5, unbroken.state.max_steps):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry][-1] == step
    resumed = trained(tmp_path, str(tmp_path / "checkpoint-5"), eval_strategy="epoch", **arguments)
    expected = unbroken.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_resumed_run_counts_the_seconds_of_all_parts_and_leaves_out_means_over_one(tmp_path):
    unbroken = trained(tmp_path, max_steps=3)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    kept = json.loads(state.read_text())
    clock = kept["stateful_callbacks"]["Clock"]["attributes"]
    assert 0 < clock["before"] < unbroken.clock.seconds
    clock["before"] = 1000.0
    state.write_text(json.dumps(kept))
    resumed = trained(tmp_path, str(state.parent), max_steps=3)
    assert 1000 < resumed.clock.seconds < 1100
    assert {"train_loss", "train_runtime"} <= unbroken.state.log_history[-1].keys()
    assert resumed.state.log_history[-1].keys() == {"step", "epoch", "total_flos"}
    assert trained(tmp_path, max_steps=3).clock.seconds < 100  # a run that begins anew


@pytest.mark.parametrize("stopped_at", [3, 7])
def test_rows_grouped_by_length_come_in_the_same_order_after_a_resume(stopped_at, tmp_path):
    """Transformers' own sampler draws them from the global generator."""
    arguments = {"train_sampling_strategy": "group_by_length", "max_steps": 9, "by_length": True}
    unbroken = trained(tmp_path, **arguments)
    resumed = trained(tmp_path, str(tmp_path / f"checkpoint-{stopped_at}"), **arguments)
    for got, expected in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(got, expected)


def stages(folder):
    """Settings of a small run of each stage, whose files lie in ``folder``."""
    model, data = str(folder / "model"), str(folder / "data.jsonl")
    common = {"model": model, "output": str(folder / "output"), "max_length": 48}
    yield fine_tune, FineTuningSettings(data=data, eval_data=data, **common)
    yield train_heads, HeadTrainingSettings(data=[data], num_heads=1, early_stopping_patience=1, **common)


def test_a_run_is_resumed_where_its_files_were_moved_to_but_not_where_they_changed(tmp_path):
    save_checkpoint(tmp_path / "here" / "model")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for (_, here), (_, there) in zip(stages(tmp_path / "here"), stages(tmp_path / "there"), strict=True):
        assert settings_of_run(here, args, {}) == settings_of_run(there, args, {})
        assert str(tmp_path) not in json.dumps(settings_of_run(here, args, {}))
    save_checkpoint(tmp_path / "there" / "model", seed=1)
    for (_, here), (_, there) in zip(stages(tmp_path / "here"), stages(tmp_path / "there"), strict=True):
        assert settings_of_run(here, args, {}) != settings_of_run(there, args, {})


def test_a_callers_arguments_serve_for_a_second_run(tmp_path):
    save_checkpoint(tmp_path / "model")
    write_chats(tmp_path / "data.jsonl", 20)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, report_to="none"
    )
    before = args.to_dict()
    for output in ("first", "second"):
        for number, (stage, settings) in enumerate(stages(tmp_path)):
            settings.output = str(tmp_path / output / str(number))
            stage(settings, args)
    assert args.to_dict() == before
