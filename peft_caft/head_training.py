"""Stage 1 of CAFT: train auxiliary heads with the base model frozen, once per base model.

The objective is the auxiliary sum alone, with beta = gamma = 1: sum over heads of alpha^(k-1) * CE_k.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from .artifact import load_weights
from .backbone import Backbone
from .data import EncodedData, collator, encode, file_sha256, read_jsonl
from .head_metrics import HeadMetrics, evaluate_heads
from .heads import AuxiliaryHeads
from .loss import auxiliary_loss
from .provenance import peak_memory_mib, provenance
from .run_folder import RunFolder
from .targets import supervised_count
from .trainer_arguments import training_settings


@dataclass
class HeadTrainingSettings:
    """What to train: see the help texts of ``peft-caft train-heads``, which mirror these fields."""

    model: str
    data: str
    output: str
    eval_data: str | None = None
    eval_rows: int = 200
    num_heads: int = 4
    head_type: str = "decoder_layer"
    head_input: str = "last_layer_input"
    head_num_layers: int = 1
    aux_loss_decay: float = 0.8
    max_length: int = 512
    max_rows: int | None = None
    dtype: str = "auto"


class HeadPretraining(nn.Module):
    """The frozen base model with trainable heads, as a module that ``transformers.Trainer`` can train.

    The base model runs up to its last layer's norm and computes no logits of its own.
    """

    loss_type = "ForCausalLM"  # tells Trainer that labels are shifted, for num_items_in_batch

    def __init__(self, model: nn.Module, heads: AuxiliaryHeads, aux_loss_decay: float) -> None:
        super().__init__()
        self.base = model.requires_grad_(False)
        self.heads = heads.requires_grad_(True)
        self.config = model.config
        self.aux_loss_decay = aux_loss_decay
        self._backbone = Backbone.of(model)

    def train(self, mode: bool = True) -> HeadPretraining:
        super().train(mode)
        self.base.eval()  # its dropout would make the hidden states, which the heads learn from, noisy
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Loss of a batch; ``input_ids``, ``labels`` and ``attention_mask`` are ``(batch, tokens)``."""
        with torch.no_grad(), self._backbone.capture() as records:
            self._backbone.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        auxiliary = auxiliary_loss(self.heads, self._backbone, records[-1], labels, attention_mask)
        divisor = supervised_count(labels).clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": auxiliary.weighted(self.aux_loss_decay) / divisor}


class HeadTrainer(Trainer):
    """Trainer whose checkpoints hold the heads artifact instead of the whole model."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).heads.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model).heads, Path(resume_from_checkpoint))


def train_heads(settings: HeadTrainingSettings, args: TrainingArguments, overwrite: bool = False) -> dict[str, Any]:
    """Train heads and write them to ``settings.output``; an interrupted run is taken up at its last checkpoint.

    Args:
        settings: model, data and heads.
        args: of the Trainer; its ``output_dir`` is where checkpoints go and is set here.
        overwrite: replace a finished run.

    Returns:
        the summary, also written as ``summary.json``: per-head metrics before and after, seconds, peak memory.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, TypeError: as the message says.
    """
    folder = RunFolder(Path(settings.output))
    args.output_dir = str(folder.checkpoints)
    # Fails on bad data before anything is written.
    train_rows, eval_rows = _rows(settings)
    resume_from = folder.begin(asdict(settings) | training_settings(args), overwrite)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype).to(args.device)
    train_data, eval_data = (encode(rows, tokenizer, settings.max_length) for rows in (train_rows, eval_rows))
    print(f"Training data: {train_data.describe()}\nHeld-out data: {eval_data.describe()}")
    heads = AuxiliaryHeads.from_base_model(
        model, settings.num_heads, settings.head_type, settings.head_input, settings.head_num_layers
    )
    print(f"Heads: {sum(p.numel() for p in heads.parameters()):,} parameters, {settings.head_type}")
    # The optimizer steps in fp32 even where the base model computes in half precision.
    heads.float()
    collate = collator(tokenizer)
    before = evaluate_heads(heads, model, eval_data.rows, collate, description="Held-out, before training")
    started = time.perf_counter()
    trainer = HeadTrainer(
        HeadPretraining(model, heads, settings.aux_loss_decay),
        args,
        train_dataset=train_data.rows,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = time.perf_counter() - started
    heads.to(model.dtype)  # as they are saved, so that the figures are those of the artifact
    after = evaluate_heads(heads, model, eval_data.rows, collate, description="Held-out, after training")
    heads.config.training = _training_record(settings, args, train_data, before, after)
    heads.save_pretrained(settings.output)
    summary = {
        "metrics_before": [m.to_dict() for m in before],
        "metrics_after": [m.to_dict() for m in after],
        "train_seconds": seconds,
        "peak_memory_mib": peak_memory_mib(),
        "log_history": trainer.state.log_history,
    }
    folder.finish(summary)
    return summary


def _rows(settings: HeadTrainingSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = read_jsonl(settings.data, settings.max_rows)
    if settings.eval_data is not None:
        return rows, read_jsonl(settings.eval_data, settings.eval_rows)
    held_out = min(settings.eval_rows, len(rows) // 10)
    if held_out < 1:
        raise ValueError(
            f"data: got {len(rows)} rows in {settings.data}, expected at least 10, of which one in ten is held out. "
            "Give more rows, or held-out ones with --eval-data."
        )
    return rows[:-held_out], rows[-held_out:]


def _training_record(
    settings: HeadTrainingSettings,
    args: TrainingArguments,
    data: EncodedData,
    before: list[HeadMetrics],
    after: list[HeadMetrics],
) -> dict[str, Any]:
    return {
        "data": f"{Path(settings.data).name}, {data.describe()}",
        "data_sha256": file_sha256(settings.data),
        "targets": "hard",
        "aux_loss_decay": settings.aux_loss_decay,
        "max_length": settings.max_length,
        **training_settings(args),
        **provenance(),
        "metrics_before": [m.to_dict() for m in before],
        "metrics_after": [m.to_dict() for m in after],
    }
