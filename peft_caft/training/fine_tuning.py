"""Stage 2 of CAFT: fine-tunes on a JSONL file, with or without the auxiliary loss."""

import copy
import re
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from ..basics.adapters import tokenizer_of
from ..basics.files import file_sha256, filling
from ..basics.provenance import peak_memory_mib, provenance
from ..basics.run_folder import RunFolder
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.sharding import whole
from ..method.callback import TRAINED_HEADS_NAME, CAFTCallback, objective_of
from ..method.config import target_modules
from ..method.full_fine_tuning import FullFineTuningConfig, prepare_full_fine_tuning
from ..method.model import CAFTConfig
from ..method.objective_config import ObjectiveConfig
from .arguments import require_honoured, training_settings
from .data import collator, encode, read_jsonl, require_positions, tokens_sha256
from .engine import checkpoint_files, divides_parameters, engine_name, gather, shards_parameters
from .loading import load_base_model, require_dtype, require_tokenizer_of
from .resumption import ResumableTrainer as Trainer
from .resumption import begun, settings_of_run
from .settings import FineTuningSettings


def prepare(model: PreTrainedModel, settings: FineTuningSettings) -> nn.Module:
    """``model`` with the adapter or objective of the method, ready for a Trainer."""
    objective = {field.name: getattr(settings, field.name) for field in fields(ObjectiveConfig)}
    if settings.method == "caft_full":
        config = FullFineTuningConfig(**objective, freeze_unembedding=settings.freeze_unembedding)
        return prepare_full_fine_tuning(model, config)
    if settings.method == "full":
        model.get_output_embeddings().requires_grad_(not settings.freeze_unembedding)
        return model
    lora = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": target_modules(settings.target_modules),
        "task_type": "CAUSAL_LM",
        **settings.lora,
    }
    # caft and lora get the same settings, so that they differ in the auxiliary loss alone.
    config = CAFTConfig(**lora, **objective) if settings.method == "caft" else LoraConfig(**lora)
    _require_found(model, settings.lora)
    peft_model = get_peft_model(model, config)
    for name, layer in peft_model.named_modules() if settings.changes_base_weights else ():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            most = len(layer.lora_A["default"].weight)  # number of singular values, if r is above it
            if most < layer.r["default"]:
                raise ValueError(f"r: got {layer.r['default']}, expected at most {most}, the smaller side of {name}.")
    return peft_model


def _require_found(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raise a ValueError if LoraConfig names what the model lacks, which PEFT (0.21) ignores."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field in ("modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules", "target_parameters"):
        places = parameters if field == "target_parameters" else modules
        wanted = lora.get(field) or []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            is_pattern = isinstance(wanted, (str, dict))
            pattern = re.compile(
                (r"(?:.*\.)?" if wanted is not name else "") + f"(?:{name if is_pattern else re.escape(name)})"
            )
            if not any(pattern.fullmatch(place) for place in places):
                raise ValueError(f"lora.{field}: got {name!r}, expected a name in the model, such as {places[-1]!r}.")
    tokens = lora.get("trainable_token_indices") or []
    rows = model.get_input_embeddings().num_embeddings
    for index in tokens if isinstance(tokens, list) else [index for indices in tokens.values() for index in indices]:
        if not 0 <= index < rows:
            raise ValueError(
                f"lora.trainable_token_indices: got {index}, expected at least 0 and less than {rows:,}, the rows of the embedding."
            )


def fine_tune(settings: FineTuningSettings, args: TrainingArguments, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune, and write a LoRA adapter or the whole model. An interrupted run is resumed.

    The same seed gives LoRA and CAFT the same initial adapter and the same order of data.

    Args:
        args: arguments of the Trainer; ``output_dir``, the folder of checkpoints, is set here.
        overwrite: replace a finished run, or an interrupted one with other settings.

    Returns:
        the summary, also written as ``summary.json``: held-out next-token loss before and after
        (nats/token), seconds, peak memory, trainable parameters, log history.

    Raises:
        FileExistsError: if the output holds a finished run, or one with other settings.
        FileNotFoundError: if there are no such data or heads.
        ValueError: if data, heads or a setting cannot be used.
        TypeError: if CAFT does not support the model.
    """
    args = copy.copy(args)  # the caller may use them again
    require_honoured(args, settings.set_by_command | settings.unused_arguments)
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model: got {args.metric_for_best_model!r}, expected 'eval_loss', the only metric of this command."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}, expected 0. With it Trainer keeps the labels from the "
            "model, which then cannot compute the auxiliary loss, and held-out losses would be smoothed ones."
        )
    for option, given in (
        ("init_lora_weights", settings.changes_base_weights),
        ("load_in_4bit", settings.load_in_4bit),
        ("load_in_8bit", settings.load_in_8bit),
    ):
        if given and divides_parameters(args):
            raise ValueError(
                f"{option}: given with an engine that divides parameters ({engine_name(args)}), where it is not supported. Train with "
                "one process, DDP or ZeRO-2, or leave it out."
            )
    rows = read_jsonl(settings.data, settings.max_rows)
    eval_rows = read_jsonl(settings.eval_data, settings.eval_rows) if settings.eval_data else []
    folder = RunFolder(Path(settings.output))
    args.output_dir = str(folder.checkpoints)
    has_trained_heads = settings.has_auxiliary_loss and settings.train_heads != "frozen"
    data_sha256 = file_sha256(settings.data)
    is_first = args.process_index == 0
    eval_sha256 = settings.eval_data and file_sha256(settings.eval_data)
    recorded = settings_of_run(settings, args, {"data_sha256": data_sha256, "eval_data_sha256": eval_sha256})
    if not overwrite:
        folder.require_free(recorded, to_come=("tokens_sha256",))
    if not is_first:
        disable_progress_bar()
    tokenizer = tokenizer_of(settings.model)
    model = load_base_model(settings)
    require_dtype(model, settings.loading_dtype, args)
    data = encode(rows, tokenizer, settings.max_length, quiet=not is_first)
    if is_first:
        print(f"Training data: {data.describe()}")
    held_out = encode(eval_rows, tokenizer, settings.max_length, quiet=not is_first).rows if eval_rows else None
    all_rows = [*data.rows, *(held_out or [])]
    recorded["tokens_sha256"] = tokens_sha256(all_rows)
    require_positions(all_rows, model.config, settings.max_length)
    require_tokenizer_of(model, tokenizer, (row["input_ids"] for row in all_rows))
    set_seed(args.seed)
    model = prepare(model, settings)
    collate = collator(tokenizer)
    # All checks have passed; from here on the output is written.
    with folder.held() if is_first else nullcontext():
        needed = (*checkpoint_files(args), *([TRAINED_HEADS_NAME] if has_trained_heads else []))
        resume_from = begun(folder, recorded, args, overwrite, needed)
        initial = folder.checkpoints / "initial_adapter" if settings.changes_base_weights else None
        if initial is not None and is_first:
            model.save_pretrained(initial)
        # After trainer.evaluate() accelerate would take the model for wrapped, and leave out DDP.
        args.eval_on_start = held_out is not None and resume_from is None
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trainer = Trainer(
            model,
            args,
            train_dataset=data.rows,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=[CAFTCallback()] if settings.has_auxiliary_loss else None,
        )
        trained_heads = heads = objective_of(model).heads_for_training() if has_trained_heads else None
        if shards_parameters(trainer):
            heads = copy.deepcopy(heads)  # impossible once the parameters lie in several processes
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = trainer.clock.seconds
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
                # What was taken out of the base weights goes into the adapter, which becomes plain.
                conversion = {} if initial is None else {"path_initial_model_for_weight_conversion": str(initial)}
                model.save_pretrained(temporary, state_dict=weights, **conversion)
                tokenizer.save_pretrained(temporary)
            if heads is not None:
                heads.config.training = _record_of_trained_heads(settings, args, data_sha256, len(data.rows), heads)
                heads.save_pretrained(Path(settings.output) / "trained_heads")
            folder.finish(summary)
        return summary


def _whole_state(trainer: Trainer) -> dict[str, Any] | None:
    """State dict that all processes gather on the first one; None if each holds the whole model."""
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
    # A tied weight was gathered once under each of its names; only one of them is saved.
    tied = {} if adapters_alone else trainer.model.all_tied_weights_keys
    return {name: values for name, values in state.items() if name not in tied}


def _record_of_trained_heads(
    settings: FineTuningSettings, args: TrainingArguments, data_sha256: str, rows: int, heads: AuxiliaryHeads
) -> dict[str, Any]:
    """The training record of heads that were trained in stage 2; it replaces that of stage 1."""
    return {
        "stage": f"2, along with {'the model' if settings.trains_all else 'an adapter'} ({settings.train_heads})",
        "data": [{"file": Path(settings.data).name, "rows": rows, "sha256": data_sha256}],
        "targets": "hard",
        "aux_loss_decay": settings.aux_loss_decay,
        "max_length": settings.max_length,
        "initial_heads": None if settings.heads is None else heads.recorded_as(settings.heads),
        **training_settings(args),
        **provenance(),
    }
