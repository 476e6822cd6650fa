"""Stage 2 of CAFT, and the same without it: fine-tune on a JSONL file, so that one setting makes the difference."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ..basics.checks import require_choice
from ..basics.files import file_sha256, filling
from ..basics.provenance import peak_memory_mib, provenance
from ..basics.run_folder import RunFolder, random_states
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.config import DEFAULT_NUM_HEADS
from ..heads.sharding import gather, shards_parameters, whole
from ..method.callback import TRAINED_HEADS_NAME, CAFTCallback, objective_of
from ..method.config import ObjectiveConfig
from ..method.full_fine_tuning import FullFineTuningConfig, prepare_full_fine_tuning
from ..method.model import CAFTConfig
from .arguments import training_settings
from .data import collator, encode, read_jsonl
from .engine import engine_name, require_dtype

METHODS = ("caft", "lora", "caft_full", "full")


@dataclass
class FineTuningSettings:
    """What to fine-tune: see the help texts of ``peft-caft train``, which mirror these fields."""

    model: str
    data: str
    output: str
    method: str = "caft"
    eval_data: str | None = None
    eval_rows: int = 200
    max_rows: int | None = None
    max_length: int = 512
    dtype: str = "auto"
    freeze_unembedding: bool = False
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    heads: str | None = None
    heads_revision: str | None = None
    num_auxiliary_heads: int = DEFAULT_NUM_HEADS
    aux_loss_weight: float = 0.01
    aux_loss_decay: float = 0.8
    aux_loss_schedule: str = "reflected_sine"
    train_heads: str = "frozen"
    aux_token_fraction: float = 1.0

    def __post_init__(self) -> None:
        require_choice("method", self.method, METHODS)
        if self.freeze_unembedding and not self.trains_all:
            raise ValueError(
                f"freeze_unembedding: got true with method={self.method!r}, where the base model is frozen anyway; expected it with "
                "'caft_full' or 'full' alone."
            )

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.method in ("caft", "caft_full")

    @property
    def trains_all(self) -> bool:
        """Whether all parameters of the base model are trained, and not LoRA adapters."""
        return self.method in ("caft_full", "full")

    @property
    def loading_dtype(self) -> str:
        """Updates of a whole model get lost in half precision."""
        return "float32" if self.dtype == "auto" and self.trains_all else self.dtype

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """``model`` with what the method adds to it, ready for a Trainer."""
        if not self.trains_all:
            return get_peft_model(model, self._peft_config())
        if self.method == "caft_full":
            config = FullFineTuningConfig(**self._objective(), freeze_unembedding=self.freeze_unembedding)
            return prepare_full_fine_tuning(model, config)
        model.get_output_embeddings().requires_grad_(not self.freeze_unembedding)
        return model

    def _peft_config(self) -> LoraConfig:
        """The `CAFTConfig`, or the ``LoraConfig`` that differs from it in the auxiliary loss alone."""
        targets = self.target_modules if self.target_modules == "all-linear" else self.target_modules.split(",")
        lora: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
        }
        return CAFTConfig(**lora, **self._objective()) if self.method == "caft" else LoraConfig(**lora)

    def _objective(self) -> dict[str, Any]:
        names = {field.name for field in fields(ObjectiveConfig)} & {field.name for field in fields(self)}
        return {name: getattr(self, name) for name in names}


def fine_tune(settings: FineTuningSettings, args: TrainingArguments, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune and write a LoRA adapter, or the whole model, to ``settings.output``; an interrupted run goes on.

    The same seed gives LoRA and CAFT the same initial adapter and the same order of data.

    Args:
        settings: model, data, method.
        args: of the Trainer; its ``output_dir`` is where checkpoints go and is set here.
        overwrite: replace a finished run.

    Returns:
        the summary, also written as ``summary.json``: held-out next-token loss before and after (nats/token), seconds,
        peak memory, trainable parameters, log history.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, TypeError: as the message says.
    """
    if settings.has_auxiliary_loss and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}, expected 0. With it Trainer keeps the labels "
            "from the model, which then cannot compute the auxiliary loss."
        )
    rows = read_jsonl(settings.data, settings.max_rows)
    eval_rows = read_jsonl(settings.eval_data, settings.eval_rows) if settings.eval_data else []
    folder = RunFolder(Path(settings.output))
    args.output_dir = str(folder.checkpoints)
    has_trained_heads = settings.has_auxiliary_loss and settings.train_heads != "frozen"
    data_sha256 = file_sha256(settings.data)
    is_first = args.process_index == 0
    # Rows that were taken by other processes are other steps.
    recorded = asdict(settings) | training_settings(args) | {"processes": args.world_size, "engine": engine_name(args)}
    recorded |= {"data_sha256": data_sha256}
    if not overwrite:
        folder.require_free(recorded)
    if not is_first:
        disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.loading_dtype)
    require_dtype(model, settings.loading_dtype, args)
    data = encode(rows, tokenizer, settings.max_length, quiet=not is_first)
    if is_first:
        print(f"Training data: {data.describe()}")
    held_out = encode(eval_rows, tokenizer, settings.max_length, quiet=not is_first).rows if eval_rows else None
    set_seed(args.seed)
    model = settings.prepare(model)
    # Everything that was asked for is there and fits.
    with folder.held() if is_first else nullcontext():
        with args.main_process_first(local=False):
            needed = (*random_states(args.world_size), *([TRAINED_HEADS_NAME] if has_trained_heads else []))
            resume_from = folder.begin(recorded, overwrite and is_first, needed)
        # Not by trainer.evaluate(): accelerate would take the model for wrapped then, and each process would train by itself.
        args.eval_on_start = held_out is not None and resume_from is None
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trainer = Trainer(
            model,
            args,
            train_dataset=data.rows,
            eval_dataset=held_out,
            data_collator=collator(tokenizer),
            callbacks=[CAFTCallback()] if settings.has_auxiliary_loss else None,
        )
        trained_heads = heads = objective_of(model).heads_for_training() if has_trained_heads else None
        if shards_parameters(trainer):
            heads = copy.deepcopy(heads)  # which cannot be copied once its parameters are in several processes
        trainer.add_callback(clock := _Clock())
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = time.perf_counter() - clock.started
        after = trainer.evaluate()["eval_loss"] if held_out else None
        before = next((e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e), None)
        weights = _whole_state(trainer)
        if trained_heads is not None and heads is not None and shards_parameters(trainer):
            gather(trained_heads, heads)
        summary = {
            "method": settings.method,
            "eval_loss_before": before,
            "eval_loss_after": after,
            "train_seconds": seconds,
            "peak_memory_mib": peak_memory_mib(),
            "trainable_parameters": trainable,
            "processes": args.world_size,
            "data_sha256": data_sha256,
            **provenance(),
            "log_history": trainer.state.log_history,
        }
        if is_first:
            with filling(settings.output) as temporary:
                model.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
            if heads is not None:
                heads.config.training = _record_of_trained_heads(settings, args, data_sha256, len(data.rows), heads)
                heads.save_pretrained(Path(settings.output) / "trained_heads")
            folder.finish(summary)
        return summary


class _Clock(TrainerCallback):
    """Notes when the first step begins: after the evaluation at the start."""

    started = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.started or time.perf_counter()


def _whole_state(trainer: Trainer) -> dict[str, Any] | None:
    """What is to be saved, gathered from the processes that hold parts of it; None where every process has the whole model.

    All processes call it together; the first one gets it.
    """
    if not shards_parameters(trainer):
        return None
    adapters_alone = isinstance(trainer.model, PeftModel)
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        state = {}
        for name, tensor in trainer.model.state_dict(keep_vars=True).items():
            if tensor.requires_grad or not adapters_alone:
                values = whole(tensor)
                if trainer.is_world_process_zero():
                    state[name] = values.detach().cpu()
    # A tied weight has been gathered under each of its names, and so is no longer known for one.
    tied = {} if adapters_alone else trainer.model.all_tied_weights_keys
    return {name: values for name, values in state.items() if name not in tied}


def _record_of_trained_heads(
    settings: FineTuningSettings, args: TrainingArguments, data_sha256: str, rows: int, heads: AuxiliaryHeads
) -> dict[str, Any]:
    """What heads that were trained along say of themselves, in place of what stage 1 wrote about other weights."""
    return {
        "stage": f"2, along with an adapter ({settings.train_heads})",
        "data": [{"file": Path(settings.data).name, "rows": rows, "sha256": data_sha256}],
        "targets": "hard",
        "aux_loss_decay": settings.aux_loss_decay,
        "max_length": settings.max_length,
        "initial_heads": None if settings.heads is None else heads.recorded_as(settings.heads),
        **training_settings(args),
        **provenance(),
    }
