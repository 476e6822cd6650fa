"""Module and Trainer of stage 1: a frozen base model with trainable heads.

The objective is the sum over heads of alpha^(k-1) * CE_k.
"""

from __future__ import annotations

import copy
import hashlib
import os
from itertools import count
from typing import Any, get_args

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from ..basics.checks import require_choice, require_token_fraction
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.pretrained import load_weights
from ..heads.sharding import copy_into, whole
from ..heads.watched_pass import Captured
from ..method.loss import auxiliary_loss
from ..method.progress import RecentLosses
from ..method.targets import IGNORE_INDEX, Supervision
from .engine import gather, reshard, scatter, shards_parameters
from .head_metrics import HeadEvaluation, batch_totals, length_sorted
from .resumption import ResumableTrainer
from .settings import Targets
from .soft_targets import soft_auxiliary_loss


class HeadPretraining(nn.Module):
    """The frozen base model with trainable heads, for ``transformers.Trainer``.

    The base model runs up to its final norm, or, on given hidden states, its last layer alone.

    Args:
        aux_loss_decay: alpha.
        targets: ``"hard"``, the tokens of the text; or ``"soft"``, the base model's distributions.
        aux_token_fraction: share of the positions that are drawn in each step.
    """

    loss_type = "ForCausalLM"  # so Trainer counts shifted labels in num_items_in_batch

    def __init__(
        self,
        model: nn.Module,
        heads: AuxiliaryHeads,
        aux_loss_decay: float,
        targets: str = "hard",
        aux_token_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        require_choice("targets", targets, get_args(Targets))
        require_token_fraction(aux_token_fraction)
        self.base = model.requires_grad_(False)
        self.heads = heads.requires_grad_(True)
        self.config = model.config
        self.aux_loss_decay = aux_loss_decay
        self.targets = targets
        self.aux_token_fraction = aux_token_fraction
        self._sampling_seeds = count()
        self.recent = RecentLosses()
        self._backbone = Backbone.of(model)
        # FSDP shards these one by one: layers of the base model, and heads that are copies of one.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self._backbone.layers})

    def begin_step(self, seed: int, step: int, process: int) -> None:
        """Seed the draws of positions with the place in the run, so that a resume repeats them."""
        digest = hashlib.sha256(f"{seed}, {step}, {process}".encode()).digest()
        self._sampling_seeds = count(int.from_bytes(digest[:6], "big"))

    def train(self, mode: bool = True) -> HeadPretraining:
        super().train(mode)
        self.base.eval()  # its dropout would add noise to the hidden states
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Loss of a batch in training mode, its `batch_totals` in evaluation mode.

        Args:
            input_ids, labels: int64 ``(batch, tokens)``; labels are -100 where unsupervised.
            attention_mask: ``(batch, tokens)``, 0 for padding.
            hidden_states: ``(batch, tokens, hidden)``, input of the last layer in an earlier pass.
            num_items_in_batch: divisor of the loss; None takes the next-token targets of the batch.

        Returns:
            ``{"loss": fp32 scalar, nats}`` or ``{"totals": float64 (heads + 1, 4)}``.
        """
        if not self.training:
            captured = self._captured(input_ids, attention_mask, hidden_states)
            with torch.no_grad():
                return {"totals": batch_totals(self.heads, self._backbone, captured, labels, attention_mask)}
        supervision = Supervision.of(  # before the model runs, while the host need not wait long for the device
            labels,
            len(self.heads.heads),
            {"attention_mask": attention_mask},
            fraction=self.aux_token_fraction,
            seed=next(self._sampling_seeds),
            draw_predicted=self.targets == "soft",
        )
        captured = self._captured(input_ids, attention_mask, hidden_states)
        loss_of = auxiliary_loss if self.targets == "hard" else soft_auxiliary_loss
        supervised = supervision.next_token.count
        divisor = max(1, supervised) if num_items_in_batch is None else num_items_in_batch
        auxiliary = loss_of(
            self.heads, self._backbone, captured, supervision, decay=self.aux_loss_decay, weight=1 / divisor
        )
        self.recent.add(auxiliary, supervised)
        return {"loss": auxiliary.total}

    @torch.no_grad()
    def _captured(self, input_ids: Tensor, attention_mask: Tensor | None, hidden_states: Tensor | None) -> Captured:
        with self._backbone.starting_at_last_layer(hidden_states), self._backbone.capture() as records:
            self._backbone.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return records[-1]


class _TellStep(TrainerCallback):
    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        kwargs["model"].begin_step(args.seed, state.global_step, args.process_index)


class HeadTrainer(ResumableTrainer):
    """Trainer that evaluates every head on a dict of evaluation sets, and saves the heads alone."""

    ordered = ("random", "group_by_length")

    def __init__(self, model: HeadPretraining, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.add_callback(_TellStep())
        self._before: dict[str, HeadEvaluation] | None = None
        self.sharded = shards_parameters(self)
        # Sharded modules cannot be copied, so the place for whole parameters is made before.
        self._whole_heads = copy.deepcopy(model.heads).cpu() if self.sharded else model.heads

    @property
    def _heads(self) -> AuxiliaryHeads:
        return self.accelerator.unwrap_model(self.model).heads

    def trained_heads(self) -> AuxiliaryHeads:
        """The whole heads, on the CPU if they are sharded; all processes call it together."""
        if self.sharded:
            gather(self._heads, self._whole_heads)
        return self._whole_heads

    @torch.no_grad()
    def round_heads(self, dtype: torch.dtype) -> None:
        """Round the heads to ``dtype``, so that the next evaluation measures what is saved."""
        if not self.sharded:
            self._heads.to(dtype)
        else:  # whose dtype is fixed
            for parameter in self._heads.parameters():
                copy_into(parameter, whole(parameter).to(dtype))

    @torch.no_grad()
    def evaluate_heads(self, description: str) -> dict[str, HeadEvaluation]:
        """Name -> evaluation of every evaluation set; each process takes a share of the rows."""
        evaluations = {}
        quiet = not self.is_world_process_zero()
        self.model_wrapped.eval()
        for name, rows in self.eval_dataset.items():
            share = rows[self.args.process_index :: self.args.world_size]
            if len(share) * self.args.world_size < len(rows):  # all processes must run equally many batches
                share = [*share, rows[0] | {"labels": [IGNORE_INDEX] * len(rows[0]["labels"])}]
            batches = length_sorted(share, self.data_collator, self.args.per_device_eval_batch_size)
            bar = tqdm(batches, desc=f"{description}, {name}", unit=" batches", leave=False, disable=quiet)
            totals = [self.model_wrapped(**batch.to(self.args.device))["totals"] for batch in bar]
            evaluations[name] = HeadEvaluation.from_totals(self.accelerator.reduce(torch.stack(totals).sum(dim=0)))
        if self.sharded:
            reshard(self.model_wrapped)
        return evaluations

    def evaluate_before(self) -> dict[str, HeadEvaluation]:
        """Evaluate the untrained heads, once, before the first step or loaded checkpoint."""
        if self._before is None:
            self._before = self.evaluate_heads("Held-out, before training")
        return self._before

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the heads' metrics on every set; ``eval_loss`` is the mean hard loss, nats/token."""
        metrics = {}
        evaluations = self.evaluate_heads("Held-out")
        for name, evaluation in evaluations.items():
            for head in evaluation.heads:
                prefix = f"eval_{name}_head_{head.tokens_ahead}"
                metrics[f"{prefix}_loss"] = head.cross_entropy
                metrics[f"{prefix}_top1"], metrics[f"{prefix}_top5"] = head.top1, head.top5
            metrics[f"eval_{name}_acceptance_length"] = evaluation.acceptance_length
        losses = [e.weighted_cross_entropy(self.model.aux_loss_decay) for e in evaluations.values()]
        metrics["eval_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            recent = self.accelerator.unwrap_model(self.model).recent
            logs = logs | recent.read(self.model.aux_loss_decay, self.accelerator.reduce)
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.evaluate_before()
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        heads = self.trained_heads()
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            heads.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Engines would save the whole frozen base model with every checkpoint.
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        elif self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which comes next, marks a whole checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.evaluate_before()
        load_weights(self._whole_heads, resume_from_checkpoint)
        if self.sharded:
            scatter(self._whole_heads, self._heads)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Trainer would load it before the untrained heads are evaluated, and expect a base model.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.evaluate_before()
        deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
