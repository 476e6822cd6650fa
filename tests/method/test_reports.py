"""What reporters are told: the values of CAFT in the same step as the loss, with the callback alone."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_caft import CAFTCallback
from peft_caft.training.data import collator

from ..support.tiny_checkpoint import tiny_tokenizer
from .test_other_trainers import SETTINGS, caft_model, own_trainer

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
NAMES = ["loss", "caft/gamma", "caft/aux_loss", "caft/loss_head_2", "caft/loss_head_3"]


class Reporter(TrainerCallback):
    """As those of W&B, trackio and others: it passes on the logs that it is given."""

    def __init__(self) -> None:
        self.told: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append({"step": state.global_step, **logs})


def by_trainer(model, folder: Path, **changes) -> Trainer:
    rows = [{"input_ids": list(range(10, 24)), "labels": list(range(10, 24))}] * 8
    args = TrainingArguments(str(folder), **SETTINGS | changes)
    return Trainer(
        model, args, train_dataset=rows, data_collator=collator(tiny_tokenizer()), callbacks=[CAFTCallback()]
    )


def by_sft_trainer(model, folder: Path, **changes) -> Trainer:
    trl = pytest.importorskip("trl", reason="needs Python 3.11")
    from datasets import Dataset

    args = trl.SFTConfig(str(folder), **SETTINGS | {"bf16": False, "gradient_checkpointing": False} | changes)
    rows = Dataset.from_list([{"text": "name ethanol alcohol butane"}] * 8)
    return trl.SFTTrainer(
        model, args=args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[CAFTCallback()]
    )


@pytest.mark.parametrize("make", [by_trainer, by_sft_trainer])
def test_tensorboard_gets_them_in_the_same_step(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make(caft_model(), tmp_path, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events.*")).parent)).Reload()
    for name in NAMES:
        values = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert values == pytest.approx(logged, rel=1e-6)
        assert sorted(values) == [1, 2]


@pytest.mark.parametrize("first", [True, False], ids=["before it", "after it"])
def test_every_reporter_gets_them(first, tmp_path):
    reporter = Reporter()
    callbacks = [lambda: reporter, CAFTCallback] if first else [CAFTCallback, lambda: reporter]
    trainer = own_trainer(Trainer, caft_model(), tmp_path, callbacks=callbacks)
    trainer.train()
    logs = [told for told in reporter.told if "loss" in told]
    assert [told["step"] for told in logs] == [1, 2]
    assert all(set(NAMES) <= told.keys() for told in logs)
    assert [type(callback) for callback in trainer.callback_handler.callbacks].count(CAFTCallback) == 1
    trainer.train()  # again, with the same trainer
    assert len([told for told in reporter.told if "loss" in told]) == 4
