"""CAFT under TRL's SFTTrainer: the same training as under Trainer, whatever the rows look like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from peft_caft import AuxiliaryHeads, CAFTCallback, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.training.data import collator, encode, read_jsonl

from ..support.architectures import MIXTURE
from ..support.gradients import largest_difference, trainable
from ..support.places import ROOT
from ..support.tiny_checkpoint import WORDS, save_checkpoint, tiny_llama, tiny_tokenizer, write_chats
from ..support.tiny_models import LLAMA_LIKE

trl = pytest.importorskip("trl", reason="needs Python 3.11")
pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
SETTINGS = {
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_grad_norm": 1e9,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}
TARGETS = ["q_proj", "down_proj"]
LIKE_TRAINER = {"bf16": False, "gradient_checkpointing": False}
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def config(**fields) -> CAFTConfig:
    return CAFTConfig(
        **{"r": 4, "target_modules": TARGETS, "num_auxiliary_heads": 2, "aux_loss_weight": 0.5, **fields}
    )


def caft_model(model=None, **fields):
    torch.manual_seed(1)
    return get_peft_model(model or tiny_llama(), config(**fields))


def rows_of_ids(tmp_path: Path, rows: int = 12) -> list[dict]:
    return encode(read_jsonl(write_chats(tmp_path / "data.jsonl", rows)), tiny_tokenizer(), 64).rows


def trained_by_trainer(model, tmp_path: Path, **changes) -> Trainer:
    args = TrainingArguments(str(tmp_path / "trainer"), **SETTINGS | changes)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows_of_ids(tmp_path),
        data_collator=collator(tiny_tokenizer()),
        callbacks=[CAFTCallback()],
    )
    trainer.train()
    return trainer


def sft_trainer(model, tmp_path: Path, rows, callbacks=(CAFTCallback,), tokenizer=None, **changes) -> trl.SFTTrainer:
    peft_config = changes.pop("peft_config", None)
    args = trl.SFTConfig(str(tmp_path / "sft"), **SETTINGS | LIKE_TRAINER | changes)
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[make() for make in callbacks],
    )


# Without accumulation: in every other test of the quick ones, here and in the matrix of trainers.
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_sft_trainer_equals_trainer(head_type, train_heads, accumulation, tmp_path):
    fields = {"head_type": head_type, "train_heads": train_heads, "aux_loss_decay": 0.7}
    changes = {"gradient_accumulation_steps": accumulation}
    expected, got = caft_model(**fields), caft_model(**fields)
    by_trainer = trained_by_trainer(expected, tmp_path, **changes)
    trainer = sft_trainer(got, tmp_path, rows_of_ids(tmp_path), **changes)
    trainer.train()
    assert largest_difference(trainable(got), trainable(expected)) < 1e-6
    assert largest_difference(trainable(got), trainable(caft_model(**fields))) > 1e-4
    for ours, theirs in zip(trainer.state.log_history[:-1], by_trainer.state.log_history[:-1], strict=True):
        heads = {name: value for name, value in theirs.items() if name.startswith("caft/")}
        assert heads
        assert {name: ours[name] for name in heads} == pytest.approx(heads, rel=1e-5)
        # What TRL logs is the mean of log-probabilities, which are the model's own; the auxiliary loss stands beside it.
        auxiliary = 0.5 * theirs["caft/gamma"] * theirs["caft/aux_loss"]
        assert ours["loss"] + auxiliary == pytest.approx(theirs["loss"], rel=1e-4)


def full_model(**fields):
    config = FullFineTuningConfig(num_auxiliary_heads=2, aux_loss_weight=0.5, **fields)
    with pytest.warns(UserWarning, match="FullFineTuningConfig.heads is None"):
        return prepare_full_fine_tuning(tiny_llama(tie_word_embeddings=True), config)


@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["fp32", "TRL's defaults"]
)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_full_fine_tuning_equals_that_of_trainer(head_type, changes, tmp_path):
    models = [full_model(head_type=head_type) for _ in range(2)]
    trained_by_trainer(models[0], tmp_path, **changes)
    trainer = sft_trainer(models[1], tmp_path, rows_of_ids(tmp_path), **changes)
    trainer.train()
    expected, got = (trainable(model) for model in models)
    # TRL computes the model's own log-probabilities in its own way, which in bf16 is another rounding.
    assert largest_difference(got, expected) < (1e-3 if changes else 1e-6)
    assert largest_difference(got, trainable(full_model(head_type=head_type))) > 1e-2
    assert {"caft/gamma", "caft/loss_head_2"} <= trainer.state.log_history[0].keys()


def test_without_the_auxiliary_loss_it_trains_otherwise(tmp_path):
    """What the test above would not see if both trainers left it out."""
    plain, got = caft_model(aux_loss_weight=0.0), caft_model()
    for model in (plain, got):
        sft_trainer(model, tmp_path, rows_of_ids(tmp_path)).train()
    assert largest_difference(trainable(plain), trainable(got)) > 1e-4


def test_configuration_is_enough(tmp_path):
    """``peft_config=CAFTConfig(...)`` has the trainer make the model."""
    made = sft_trainer(tiny_llama(), tmp_path, rows_of_ids(tmp_path), peft_config=config())
    made.train()
    assert made.model.base_model.auxiliary_heads["default"].heads
    losses = [entry["caft/loss_head_2"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == SETTINGS["max_steps"]


def test_evaluation_loss_is_that_of_lora(tmp_path):
    args = trl.SFTConfig(str(tmp_path), **SETTINGS | LIKE_TRAINER)
    losses = []
    for make in (caft_model, lambda: get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS))):
        rows = Dataset.from_list(rows_of_ids(tmp_path))
        trainer = trl.SFTTrainer(
            make(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# What is trained on.


def chats() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"name {index} {word}"},
                {"role": "assistant", "content": f"{word} {word} {index}"},
            ]
        }
        for index, word in enumerate(WORDS)
    ]


def supervised_by(trainer: trl.SFTTrainer) -> int:
    counted = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(int((kwargs["labels"][:, 1:] != -100).sum())), with_kwargs=True
    )
    trainer.train()
    return counted[0]


def test_assistant_only_loss(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    counts = []
    for assistant_only in (False, True):
        trainer = sft_trainer(
            caft_model(), tmp_path, chats(), tokenizer=tokenizer, assistant_only_loss=assistant_only, max_steps=1
        )
        counts.append(supervised_by(trainer))
        assert trainer.state.log_history[0]["caft/loss_head_3"] > 0
    assert 0 < counts[1] < counts[0]


def test_completion_only_loss(tmp_path):
    rows = [{"prompt": f"name {word} ", "completion": f"{word} {word}"} for word in WORDS]
    counts = []
    for completion_only in (False, True):
        trainer = sft_trainer(caft_model(), tmp_path, rows, completion_only_loss=completion_only, max_steps=1)
        counts.append(supervised_by(trainer))
        assert trainer.state.log_history[0]["caft/loss_head_3"] > 0
    assert 0 < counts[1] < counts[0]


# What is not CAFT's objective is refused.


def test_dft_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type: got 'dft', expected 'nll'"):
        sft_trainer(caft_model(), tmp_path, rows_of_ids(tmp_path), loss_type="dft").train()


def test_dft_is_refused_without_the_callback(tmp_path):
    model = caft_model(aux_loss_schedule="constant")
    with pytest.raises(ValueError, match="loss_type: got 'dft', expected 'nll'"):
        sft_trainer(model, tmp_path, rows_of_ids(tmp_path), callbacks=(), loss_type="dft").train()


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="label_smoothing_factor"):
        sft_trainer(caft_model(), tmp_path, rows_of_ids(tmp_path), label_smoothing_factor=0.1).train()


@pytest.mark.filterwarnings("ignore:.*compute_loss_func:FutureWarning")
def test_own_loss_function_is_refused(tmp_path):
    trainer = sft_trainer(caft_model(), tmp_path, rows_of_ids(tmp_path))
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().mean()
    with pytest.raises(RuntimeError, match="compute_loss_func"):
        trainer.train()


def test_old_trl_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_caft.method.callback.version", lambda package: "1.8.0")
    with pytest.raises(ValueError, match=r"trl: got version 1\.8\.0, expected 1\.16 or newer"):
        sft_trainer(caft_model(), tmp_path, rows_of_ids(tmp_path)).train()


def test_rows_split_over_processes_are_refused():
    model = caft_model(aux_loss_schedule="constant").train()
    tokens = torch.arange(1, 13).view(2, 6)
    with pytest.raises(ValueError, match="shift_labels: given"):
        model(input_ids=tokens, labels=tokens, shift_labels=tokens)
    with pytest.raises(ValueError, match="shift_labels: given"):
        model(input_ids=tokens, shift_labels=tokens)


def mixture():
    shape = LLAMA_LIKE | {"vocab_size": 300, "num_hidden_layers": 2, "initializer_range": 0.1}
    config = MixtralConfig(**shape, **MIXTURE, output_router_logits=True, router_aux_loss_coef=0.5)
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_router_loss_of_a_mixture_is_kept(head_type, tmp_path):
    fields = {"head_type": head_type, "target_modules": ["q_proj", "o_proj"]}
    expected, got = caft_model(mixture(), **fields), caft_model(mixture(), **fields)
    trained_by_trainer(expected, tmp_path)
    sft_trainer(got, tmp_path, rows_of_ids(tmp_path)).train()
    assert largest_difference(trainable(got), trainable(expected)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("yaml", ["sft.yaml", "sft_packed.yaml", "sft_peft_model.yaml"])
def test_example_writes_a_plain_adapter(yaml, tmp_path):
    root = ROOT
    base = save_checkpoint(tmp_path / "model")
    AuxiliaryHeads.from_base_model(tiny_llama()).save_pretrained(tmp_path / "heads")
    files = ["--model", base, "--heads", str(tmp_path / "heads"), "--data", write_chats(tmp_path / "data.jsonl", 200)]
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "true", "--bf16", "false"]
    options += ["--max_length", "100", "--report_to", "none", "--logging_steps", "1"]
    finished = subprocess.run(
        [sys.executable, "examples/train_with_sft_trainer.py", "--config", f"examples/{yaml}", *files, *options],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "caft/loss_head_5" in finished.stdout
    adapted = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert type(adapted.peft_config["default"]) is LoraConfig
