"""README's table of trainers, rows and precisions: the gradient of a step, in every cell, against the plain equation."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_caft import CAFTCallback, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.method.callback import objective_of
from peft_caft.training.data import collator

from ..reference import reference_loss
from ..support.tables import table_in_readme
from ..support.tiny_checkpoint import WORDS, tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl", reason="needs Python 3.11")


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*heads is None:UserWarning", "ignore:.*[Pp]adding-free:UserWarning", "ignore:.*packing:UserWarning"
)


ALPHA, BETA = 0.8, 0.5


OBJECTIVE = {"aux_loss_weight": BETA, "aux_loss_schedule": "constant", "num_auxiliary_heads": 2}


SETTINGS = {
    "max_steps": 1,
    "max_grad_norm": 1e9,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


TOGETHER = {"max_length": 120, "per_device_train_batch_size": 1, "packing": True, "shuffle_dataset": False}


# How each trainer is told about rows. Trainer packs nothing itself.
ROWS = {
    "padded": {"per_device_train_batch_size": 4, "padding_free": False},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
    "packed, `bfd`": TOGETHER | {"packing_strategy": "bfd"},
    "packed, `bfd_split`": TOGETHER | {"packing_strategy": "bfd_split"},
    "packed, `wrapped`": TOGETHER | {"packing_strategy": "wrapped"},
}


PRECISIONS = {
    "fp32": {},
    "bf16 autocast, gradient checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "bf16 weights": {},
    "QLoRA (bitsandbytes, 4 bit)": {},
}


TRAINERS = {
    "`Trainer`": (Trainer, "LoRA"),
    "`SFTTrainer`": (trl.SFTTrainer, "LoRA"),
    "`SFTTrainer(peft_config=...)`": (trl.SFTTrainer, "peft_config"),
    "`Trainer`, full fine-tuning": (Trainer, "full"),
    "`SFTTrainer`, full fine-tuning": (trl.SFTTrainer, "full"),
}


FP32 = 1e-5  # largest relative error of the whole gradient; in bf16 it is the rounding's


TOLERANCE = {precision: FP32 if precision == "fp32" else 0.03 for precision in PRECISIONS}


def can_be(trainer: str, rows: str, precision: str) -> bool:
    cls, kind = TRAINERS[trainer]
    return not (cls is Trainer and "packed" in rows) and not (kind == "full" and "QLoRA" in precision)


CELLS = [(t, r, p) for t in TRAINERS for r in ROWS for p in PRECISIONS if can_be(t, r, p)]


# The quick tests have every cell in fp32 with both kinds of heads and of attention, and in half precision once.
QUICK = {("residual", "sdpa", "fp32"), ("decoder_layer", "eager", "fp32")} | {
    ("decoder_layer", "sdpa", precision) for precision in PRECISIONS if precision != "fp32"
}


TESTS = [
    pytest.param(
        *cell, head_type, attention, marks=[] if (head_type, attention, cell[2]) in QUICK else pytest.mark.slow
    )
    for cell in CELLS
    for head_type in HEAD_TYPES
    for attention in ("eager", "sdpa")
]


def documents() -> list[list[int]]:
    """Of different lengths, one shorter than the heads look ahead."""
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] for text in ("".join(WORDS[:3]), "".join(WORDS[3:5]), WORDS[5], "a b")]


def base_model(precision: str, attention: str, folder: Path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "attn_implementation": attention}
    model = tiny_llama(**shape)
    if precision == "bf16 weights":
        return model.to(torch.bfloat16)
    if "QLoRA" not in precision:
        return model
    if find_spec("bitsandbytes") is None:
        pytest.skip("see `make test-optional`")
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        quantization_config=quantisation,
        dtype=torch.bfloat16,
        device_map="cpu",
        attn_implementation=attention,
    )
    return prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False)


def prepared(model, kind: str, head_type: str):
    """``model`` as a trainer takes it, and the configuration that makes the rest there."""
    lora = CAFTConfig(r=4, target_modules=["q_proj", "down_proj"], head_type=head_type, **OBJECTIVE)
    if kind == "full":
        return prepare_full_fine_tuning(model, FullFineTuningConfig(head_type=head_type, **OBJECTIVE)), None
    return (model, lora) if kind == "peft_config" else (get_peft_model(model, lora), None)


def give_values(model) -> None:
    """The same to every adapter and head, none of them trivial."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or ("auxiliary_heads" in name and parameter.dim() == 2):
            values = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = 0.1 * values if "lora_" in name else parameter.data + 0.05 * values


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def made(trainer: str, rows: str, base, precision: str, head_type: str, folder: Path):
    cls, kind = TRAINERS[trainer]
    model, peft_config = prepared(base, kind, head_type)
    options = SETTINGS | {"bf16": False, "gradient_checkpointing": False} | PRECISIONS[precision]
    callbacks = [CAFTCallback(), FirstGradients()]
    if cls is Trainer:
        args = TrainingArguments(str(folder), per_device_train_batch_size=4, **options)
        data = [{"input_ids": ids, "labels": ids} for ids in documents()]
        collate = collator(tiny_tokenizer()) if rows == "padded" else DataCollatorWithFlattening()
        return Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks)
    args = trl.SFTConfig(str(folder), **options | ROWS[rows])
    data = Dataset.from_list([{"input_ids": ids} for ids in documents()])
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


@cache  # many cells have the same
def equation(
    kind: str, wrapped: bool, precision: str, head_type: str, attention: str, folder: Path
) -> dict[str, torch.Tensor]:
    """Gradients of the plain equation: documents in rows of their own, or, wrapped, as one text."""
    model, _ = prepared(base_model(precision, attention, folder), kind, head_type)
    give_values(model)
    texts = [[token for document in documents() for token in document]] if wrapped else documents()
    batch = collator(tiny_tokenizer())([{"input_ids": ids, "labels": ids} for ids in texts])
    objective = objective_of(model)
    objective.train()
    with objective.auxiliary_loss_enabled(False):
        loss = reference_loss(
            model if kind == "full" else model.get_base_model(),
            objective.heads_for_training().heads,
            batch["labels"],
            beta=BETA,
            gamma=1.0,
            alpha=ALPHA,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.mark.parametrize(("trainer", "rows", "precision", "head_type", "attention"), TESTS)
def test_gradient_is_that_of_the_equation(trainer, rows, precision, head_type, attention, folder):
    run = made(trainer, rows, base_model(precision, attention, folder), precision, head_type, folder)
    give_values(run.model)
    run.train()
    got = next(c.found for c in run.callback_handler.callbacks if isinstance(c, FirstGradients))
    kind = "full" if TRAINERS[trainer][1] == "full" else "LoRA"
    exact = "fp32" if "bf16" in precision else precision
    expected = equation(kind, "wrapped" in rows, exact, head_type, attention, folder)
    assert got.keys() == expected.keys()
    difference, size = (
        torch.cat([flat.flatten() for flat in values]).norm()
        for values in ([got[name] - expected[name] for name in got], expected.values())
    )
    assert difference <= TOLERANCE[precision] * size


def table() -> str:
    """What README shows; every yes is a test above."""
    lines = [
        "| trainer | rows | " + " | ".join(PRECISIONS) + " |",
        "|---|---|" + "---|" * len(PRECISIONS),
    ]
    for trainer in TRAINERS:
        for rows in ROWS:
            cells = ["yes" if can_be(trainer, rows, precision) else "-" for precision in PRECISIONS]
            if set(cells) != {"-"}:
                lines.append(f"| {trainer} | {rows} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_readme_has_the_table():
    assert table_in_readme("trainers") == table()
