"""CAFT under ``transformers.Trainer``: normalisation, schedule, logs, resume, and the guard against silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_caft import AuxiliaryHeads, CAFTCallback, CAFTConfig
from peft_caft.training.data import collator, encode, read_jsonl

from ..support.gradients import largest_difference, trainable
from ..support.tiny_checkpoint import tiny_llama, tiny_tokenizer, write_chats

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
TARGETS = ["q_proj", "down_proj"]


def caft_model(seed: int = 1, **fields):
    settings = {"r": 4, "target_modules": TARGETS, "num_auxiliary_heads": 2, "aux_loss_weight": 0.5, **fields}
    torch.manual_seed(seed)
    return get_peft_model(tiny_llama(), CAFTConfig(**settings))


def train(model, tmp_path: Path, callbacks=(CAFTCallback,), resume=None, **changes) -> Trainer:
    settings = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }
    data = encode(read_jsonl(write_chats(tmp_path / "data.jsonl")), tiny_tokenizer(), 64)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), **settings),
        train_dataset=data.rows,
        data_collator=collator(tiny_tokenizer()),
        callbacks=[make() for make in callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_accumulated_gradient_equals_full_batch(head_type, tmp_path):
    weights = []
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        model = caft_model(head_type=head_type)
        train(
            model,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        weights.append(trainable(model))
    moved = largest_difference(weights[0], trainable(caft_model(head_type=head_type)))
    assert moved > 1e-3
    assert largest_difference(weights[0], weights[1]) < 1e-6
    assert largest_difference(weights[0], weights[2]) < 1e-6


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(train_heads, tmp_path):
    fields = {"train_heads": train_heads, "lora_dropout": 0.1, "aux_token_fraction": 0.7}
    unbroken = caft_model(**fields)
    train(unbroken, tmp_path, save_strategy="steps", save_steps=2)
    resumed = caft_model(seed=9, **fields)  # other initial adapter: everything must come from the checkpoint
    train(resumed, tmp_path, resume=str(tmp_path / "out" / "checkpoint-2"))
    assert largest_difference(trainable(unbroken), trainable(resumed)) == 0.0


def test_resume_without_the_trained_heads_says_so(tmp_path):
    train(caft_model(train_heads="full"), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    (tmp_path / "out" / "checkpoint-1" / "caft_trained_heads.safetensors").unlink()
    with pytest.raises(RuntimeError, match="trained auxiliary heads"):
        train(caft_model(train_heads="full"), tmp_path, resume=str(tmp_path / "out" / "checkpoint-1"))


def test_schedule_follows_the_optimizer_step(tmp_path):
    trainer = train(caft_model(), tmp_path, max_steps=4, gradient_accumulation_steps=2)
    logged = [entry["caft/gamma"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [torch.sin(torch.pi / 2 * torch.tensor(1 - s / 4)).item() for s in range(4)]
    assert logged == pytest.approx(expected, abs=1e-6)


def test_logged_loss_is_next_token_loss_plus_weighted_auxiliary_loss(tmp_path):
    class NextTokenLoss(TrainerCallback):
        """Loss of the same first batch without auxiliary loss, before the first step."""

        value = None

        def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            if NextTokenLoss.value is None:
                torch_state = torch.get_rng_state()
                with model.auxiliary_loss_enabled(False):
                    NextTokenLoss.value = float(model(**whole_batch).loss)
                torch.set_rng_state(torch_state)

    model = caft_model(aux_loss_schedule="constant", num_auxiliary_heads=4)
    data = encode(read_jsonl(write_chats(tmp_path / "data.jsonl", 8)), tiny_tokenizer(), 64)
    whole_batch = collator(tiny_tokenizer())(data.rows)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=8,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data.rows,
        data_collator=collator(tiny_tokenizer()),
        callbacks=[NextTokenLoss(), CAFTCallback()],
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(NextTokenLoss.value + 0.5 * log["caft/aux_loss"], abs=1e-4)
    assert {"caft/loss_head_2", "caft/loss_head_3", "caft/loss_head_4", "caft/loss_head_5"} <= log.keys()


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}], ids=["label_smoothing_factor"])
def test_labels_that_never_reach_the_model_stop_the_run(changes, tmp_path):
    with pytest.raises(RuntimeError, match="label_smoothing_factor"):
        train(caft_model(), tmp_path, **changes)


def test_compute_loss_func_stops_the_run(tmp_path):
    data = encode(read_jsonl(write_chats(tmp_path / "data.jsonl")), tiny_tokenizer(), 64)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().pow(2).mean()

    trainer = Trainer(
        caft_model(),
        TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=data.rows,
        data_collator=collator(tiny_tokenizer()),
        compute_loss_func=compute_loss,
        callbacks=[CAFTCallback()],
    )
    with pytest.raises(RuntimeError, match="compute_loss_func"):
        trainer.train()


def test_callback_with_plain_lora_says_what_is_missing(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS))
    with pytest.raises(TypeError, match="without a CAFT adapter"):
        train(model, tmp_path)


def test_run_without_callback_stops_at_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"CAFTCallback\(\)"):
        train(caft_model(), tmp_path, callbacks=())


def test_progress_of_a_finished_run_is_not_taken_for_the_next_ones(tmp_path):
    model = caft_model()
    train(model, tmp_path)
    ids = torch.arange(10)[None]
    with pytest.raises(ValueError, match="set_training_progress"):
        model(input_ids=ids, labels=ids)


def test_beta_zero_run_equals_plain_lora(tmp_path):
    caft = caft_model(aux_loss_weight=0.0, lora_dropout=0.1)
    train(caft, tmp_path)
    torch.manual_seed(1)
    lora = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1, task_type="CAUSAL_LM")
    )
    train(lora, tmp_path, callbacks=())
    assert largest_difference(trainable(caft), trainable(lora)) == 0.0


def test_auxiliary_loss_changes_the_run(tmp_path):
    caft, plain = caft_model(), caft_model(aux_loss_weight=0.0)
    train(caft, tmp_path)
    train(plain, tmp_path)
    assert largest_difference(trainable(caft), trainable(plain)) > 1e-4


def test_pretrained_heads_are_not_changed_by_a_frozen_run(tmp_path):
    AuxiliaryHeads.from_base_model(tiny_llama()).save_pretrained(tmp_path / "heads")
    model = caft_model(heads=str(tmp_path / "heads"))
    before = {name: p.clone() for name, p in model.auxiliary_heads.named_parameters()}
    train(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.auxiliary_heads.named_parameters())
