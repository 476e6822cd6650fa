"""`train_heads`: one run of stage 1, from data files to heads that are evaluated and written."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ..basics.adapters import tokenizer_of, whole_model
from ..basics.files import file_sha256
from ..basics.provenance import peak_memory_mib, provenance
from ..basics.reading import json_or_none
from ..basics.run_folder import RunFolder
from ..heads.auxiliary_heads import AuxiliaryHeads
from .arguments import require_honoured, training_settings
from .data import EncodedData, collator, encode, read_jsonl, require_positions, tokens_sha256
from .engine import checkpoint_files, sharding_requested
from .head_trainer import HeadPretraining, HeadTrainer
from .hidden_states_cache import cached_rows, with_hidden_states
from .loading import require_dtype, require_tokenizer_of
from .resumption import begun, settings_of_run
from .settings import HeadTrainingSettings


def train_heads(settings: HeadTrainingSettings, args: TrainingArguments, overwrite: bool = False) -> dict[str, Any]:
    """Train heads and write them to ``settings.output``. An interrupted run is resumed.

    Args:
        args: arguments of the Trainer; ``output_dir``, the folder of checkpoints, is set here.
        overwrite: replace a finished run, or an interrupted one with other settings.

    Returns:
        the training record in the heads' ``config.json``, with peak memory and the Trainer's log
        history; also written as ``summary.json``.

    Raises:
        FileExistsError: if the output holds a finished run, or one with other settings.
        FileNotFoundError: if there are no such data or heads.
        ValueError: if data, heads or a setting cannot be used.
        TypeError: if the model's architecture is not supported.
        OSError: if the disk is full.
    """
    args = copy.copy(args)  # the caller may use them again
    folder = RunFolder(Path(settings.output))
    args.output_dir = str(folder.checkpoints)
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every head takes part in every batch
    require_honoured(args, settings.unused_arguments)
    _prepare_evaluation(settings, args)
    sharded = sharding_requested(args, settings.cache)
    train_files, eval_files = read_files(settings.data, settings.eval_data, settings.max_rows, settings.eval_rows)
    is_first = args.process_index == 0
    hashes = {"data_sha256": [file.sha256 for file in (*train_files, *eval_files)]}
    recorded = settings_of_run(settings, args, hashes)
    recorded["cache"] = settings.cache is not None  # cached states are rounded as others, but batched differently
    if not overwrite:
        folder.require_free(recorded, to_come=("tokens_sha256",))
    if not is_first:
        disable_progress_bar()
    set_seed(args.seed)
    tokenizer = tokenizer_of(settings.model)
    model = whole_model(settings.model, dtype=settings.dtype).eval()
    require_dtype(model, settings.dtype, args)
    if not sharded:  # otherwise the engine moves each part to its device
        model.to(args.device)
    train, evals = (
        [file.encoded(tokenizer, settings.max_length, quiet=not is_first) for file in files]
        for files in (train_files, eval_files)
    )
    recorded["tokens_sha256"] = tokens_sha256([row for file in (*train, *evals) for row in file.encoded.rows])
    for file in (*train, *evals):
        require_positions(file.encoded.rows, model.config, settings.max_length)
        require_tokenizer_of(model, tokenizer, (row["input_ids"] for row in file.encoded.rows))
    if settings.init_heads is None:
        heads = AuxiliaryHeads.from_base_model(model, **settings.fresh_heads())
    else:
        heads = AuxiliaryHeads.from_pretrained(settings.init_heads, base_model=model)
    if is_first:
        for what, files in (("Training", train), ("Held-out", evals)):
            for file in files:
                print(f"{what} data, {file.path.name}: {file.encoded.describe()}")
        print(f"Heads: {sum(p.numel() for p in heads.parameters()):,} parameters, {heads.config.head_type}")
    if settings.base_model_id is not None:
        heads.config.base_model_name_or_path = settings.base_model_id
    heads.config.license = settings.license or heads.config.license
    collate: Any = collator(tokenizer)
    # All checks have passed; from here on the output is written.
    with folder.held() if is_first else nullcontext():
        resume_from = begun(folder, recorded, args, overwrite, checkpoint_files(args))
        dtype = model.dtype
        heads.float()  # the optimizer steps in fp32 even where the base model computes in half precision
        rows: Any = [row for file in train for row in file.encoded.rows]
        if settings.cache is not None:
            rows = cached_rows(Path(settings.cache), rows, model, collate, args.distributed_state)
        patience = settings.early_stopping_patience
        trainer = HeadTrainer(
            HeadPretraining(model, heads, settings.aux_loss_decay, settings.targets, settings.aux_token_fraction),
            args,
            train_dataset=rows,
            eval_dataset={file.path.stem: file.encoded.rows for file in evals},
            data_collator=with_hidden_states(collate),
            callbacks=None if patience is None else [_EarlyStopping(patience)],
        )
        if not trainer.sharded:  # otherwise the Trainer evaluates as soon as the engine can run them
            trainer.evaluate_before()
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = trainer.clock.seconds
        trainer.round_heads(dtype)
        before, after = trainer.evaluate_before(), trainer.evaluate_heads("Held-out, after training")
        trained = trainer.trained_heads().to(dtype)
        trained.config.training = {
            "data": [file.record() for file in train],
            "targets": settings.targets,
            "aux_loss_decay": settings.aux_loss_decay,
            "aux_token_fraction": settings.aux_token_fraction,
            "max_length": settings.max_length,
            "initial_heads": None if settings.init_heads is None else heads.recorded_as(settings.init_heads),
            # Says where a local base model's weights came from: a conversion may have rounded them.
            "base_model_weights": json_or_none(Path(settings.model, "provenance.json")),
            **training_settings(args),
            "processes": args.world_size,
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "stopped_early": trainer.state.global_step < trainer.state.max_steps,
            "seconds": seconds,
            "evaluations": [
                {
                    "name": file.path.stem,
                    **{key: value for key, value in file.record().items() if key in ("file", "sha256", "rows")},
                    "before": asdict(before[file.path.stem]),
                    "after": asdict(after[file.path.stem]),
                }
                for file in evals
            ],
            **provenance(),
        }
        summary = trained.config.training | {
            "peak_memory_mib": peak_memory_mib(),
            "log_history": trainer.state.log_history,
        }
        if is_first:
            trained.save_pretrained(settings.output)
            folder.finish(summary)
        return summary


def _prepare_evaluation(settings: HeadTrainingSettings, args: TrainingArguments) -> None:
    if settings.early_stopping_patience is None:
        return
    if args.eval_strategy == "no":
        raise ValueError(
            f"early_stopping_patience: got {settings.early_stopping_patience} with eval_strategy='no', expected evaluations during "
            "the run. Leave it out, or set --eval_strategy steps --eval_steps N."
        )
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False
    args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps
    args.restore_callback_states_from_checkpoint = True  # for the count of evaluations without gain


class _EarlyStopping(EarlyStoppingCallback):
    """Early stopping that stays stopped when a run is resumed after an interruption."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


@dataclass
class RawFile:
    """A data file as `read_jsonl` read it; ``sha256`` is that of the whole file."""

    path: Path
    rows: list[dict[str, Any]]
    sha256: str

    @classmethod
    def read(cls, path: str, limit: int | None) -> RawFile:
        return cls(Path(path), read_jsonl(path, limit), file_sha256(path))

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool) -> DataFile:
        """The file with its rows as tokens, at most ``max_length`` each."""
        return DataFile(self.path, self.sha256, encode(self.rows, tokenizer, max_length, quiet))


@dataclass
class DataFile:
    """An encoded data file, and its description for the provenance."""

    path: Path
    sha256: str
    encoded: EncodedData

    def record(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "rows": len(self.encoded.rows),
            "tokens": self.encoded.tokens,
            "supervised_tokens": self.encoded.supervised_tokens,
            "provenance": json_or_none(self.path.with_suffix(".provenance.json")),
        }


def read_files(
    data: list[str], eval_data: list[str] | None, max_rows: int | None, eval_rows: int
) -> tuple[list[RawFile], list[RawFile]]:
    """Read the training files and the held-out files, JSONL.

    Args:
        eval_data: without any, the last tenth of each training file is held out.
        max_rows: rows to use at most of each training file, those held out included.
        eval_rows: rows to use at most of each held-out file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no row, too few rows are left, or two held-out files share a name.
    """
    train = [RawFile.read(path, max_rows) for path in data]
    if eval_data:
        evals = [RawFile.read(path, eval_rows) for path in eval_data]
    else:
        evals = []
        for file in train:
            held_out = min(eval_rows, len(file.rows) // 10)
            if held_out < 1:
                raise ValueError(
                    f"data: got {len(file.rows)} rows in {file.path} and eval_rows={eval_rows}, expected at least 10 "
                    "rows, of which one in ten is held out. Give more rows, or held-out ones with --eval-data."
                )
            evals.append(RawFile(file.path, file.rows[-held_out:], file.sha256))
            file.rows = file.rows[:-held_out]
    stems = [file.path.stem for file in evals]
    if len(set(stems)) < len(stems):
        raise ValueError(f"eval_data: got the names {stems}, expected different ones for the figures. Rename a file.")
    return train, evals
