"""`CAFTCallback`: connects the auxiliary objective with ``transformers.Trainer``."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..basics.files import replacing
from ..basics.reading import is_file
from ..basics.tensors import read_tensors
from ..heads.sharding import copy_into, refuse_fsdp1, whole
from .objective import AuxiliaryObjective
from .trainer import require_usual_loss, running_trainer, trains_on_next_tokens

OLDEST_TRL = (1, 16)
TRAINED_HEADS_NAME = "caft_trained_heads.safetensors"


class CAFTCallback(TrainerCallback):
    """Callback that ``transformers.Trainer`` or TRL's ``SFTTrainer`` needs to train a CAFT model.

    It tells the schedule the optimizer step. It adds ``caft/gamma``, ``caft/aux_loss`` and
    ``caft/loss_head_2`` ... ``caft/loss_head_n`` (nats/token, means of this process since the last
    log) to the logs, before the callbacks of ``report_to`` read them. Unless ``train_heads`` is
    ``"frozen"``, it saves the heads' trained parameters in every checkpoint and restores them when
    a run is resumed. Under TRL's other trainers, which train without the auxiliary loss, it does
    nothing.

    Raises:
        RuntimeError: if a training step has no auxiliary loss, or the trainer's loss leaves it out,
            or if a checkpoint has no trained heads.
        TypeError: if the model has no CAFT adapter.
        ValueError: if TRL is too old or uses another loss, or FSDP1 shards the model.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()])
        >>> trainer.train()
    """

    _on = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        refuse_fsdp1(kwargs["model"])
        trainer = running_trainer()
        self._on = trainer is None or trains_on_next_tokens(trainer)
        if not self._on:
            return
        if trainer is not None:
            # Else those of report_to would run before this one, and read logs without its values.
            others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
            trainer.callback_handler.callbacks = [self, *others]
        _refuse_other_objectives(args)
        trained = _trained_head_parameters(objective_of(kwargs["model"]))
        if state.global_step > 0 and trained:
            _restore(trained, _checkpoint(args, state) / TRAINED_HEADS_NAME)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._on:
            objective_of(kwargs["model"]).set_training_progress(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        missing = objective_of(kwargs["model"]).what_is_missing() if self._on else None
        advice = "To train without the auxiliary loss on purpose, use `model.auxiliary_loss_enabled(False)` or CAFTConfig(aux_loss_weight=0)."
        if missing == "loss":
            raise RuntimeError(
                f"step {state.global_step} ended without an auxiliary loss, expected one in every training forward: "
                "the model saw no labels, or its adapters are disabled. `label_smoothing_factor` (got "
                f"{args.label_smoothing_factor}, expected 0) and `compute_loss_func` make Trainer strip the labels; "
                f"leave both unset. {advice}"
            )
        if missing == "backward":
            raise RuntimeError(
                f"step {state.global_step} ended without a backward pass through each auxiliary loss, which is part of outputs.loss: "
                f"the trainer's own loss (`compute_loss`) leaves that out. Add outputs.loss to it, or return outputs.loss. {advice}"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._on:
            objective_of(kwargs["model"]).forget_training_progress()  # the next run has its own length

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if not self._on or logs is None or "loss" not in logs:
            return
        metrics = {f"caft/{name}": value for name, value in objective_of(kwargs["model"]).read_metrics().items()}
        logs.update(metrics)  # which the callbacks after this one read
        state.log_history[-1].update(metrics)  # into which Trainer.log has copied the logs already

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trained = _trained_head_parameters(objective_of(kwargs["model"])) if self._on else {}
        tensors = {name: whole(parameter).detach().cpu().contiguous() for name, parameter in trained.items()}
        if trained and state.is_world_process_zero:
            with replacing(_checkpoint(args, state) / TRAINED_HEADS_NAME) as temporary:
                save_file(tensors, temporary)


def _refuse_other_objectives(args: TrainingArguments) -> None:
    """Raise a ValueError for settings of TRL's SFTTrainer with which CAFT would not train."""
    if type(args).__name__ != "SFTConfig":
        return
    require_usual_loss(args)
    if tuple(int(part) for part in version("trl").split(".")[:2]) < OLDEST_TRL:
        raise ValueError(
            f"trl: got version {version('trl')}, expected {'.'.join(map(str, OLDEST_TRL))} or newer: older ones need Triton, or the logits "
            "of all tokens, which CAFT does not compute. Run: pip install --upgrade trl"
        )


def objective_of(model: nn.Module) -> AuxiliaryObjective:
    """The CAFT tuner in a model, or what `prepare_full_fine_tuning` attached; else a TypeError."""
    for module in model.modules():
        if isinstance(module, AuxiliaryObjective):
            return module
    raise TypeError(
        f"model: got {type(model).__name__} without a CAFT adapter, expected one made by get_peft_model(model, "
        "CAFTConfig(...)), or by prepare_full_fine_tuning. Remove CAFTCallback to train another kind of model."
    )


def _trained_head_parameters(model: AuxiliaryObjective) -> dict[str, Tensor]:
    return {name: p for name, p in model.auxiliary_heads.named_parameters() if p.requires_grad}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _restore(trained: dict[str, Tensor], path: Path) -> None:
    if not is_file(path):
        raise RuntimeError(
            f"{path}: not found, expected the trained auxiliary heads of the checkpoint to resume from. The run before "
            "trained with another `train_heads`, without CAFTCallback, or in another output_dir; start anew or resume "
            "with the same settings."
        )
    saved = read_tensors(path)
    expected = {name: getattr(p, "ds_shape", p.shape) for name, p in trained.items()}  # under ZeRO-3, the whole shape
    if {name: tensor.shape for name, tensor in saved.items()} != expected:
        raise RuntimeError(f"{path}: holds other parameters than this run trains. Resume with the same settings.")
    for name, parameter in trained.items():
        copy_into(parameter, saved[name])
