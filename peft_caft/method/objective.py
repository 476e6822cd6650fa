"""`AuxiliaryObjective`: schedule and training forward of both LoRA's tuner and full fine-tuning."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from .log_probs_pass import log_probs_pass
from .loss import auxiliary_loss
from .next_token_pass import next_token_pass
from .objective_config import ObjectiveConfig
from .progress import Progress
from .supervised_pass import SupervisedPass
from .targets import Supervision
from .trainer import require_usual_loss, running_trainer, trains_on_next_tokens

HEADS_PREFIX = "auxiliary_heads."

# Yields keyword arguments for the base model, is sent what it returned, and returns the outputs.
TrainingPass = Generator[dict[str, Any], Any, Any]


class AuxiliaryObjective:
    """A module that adds the auxiliary loss to the loss of a base model while it trains.

    Attributes:
        gamma: weight of the auxiliary loss at the current step; fp32 scalar buffer, not saved.
        auxiliary_heads: module that holds the heads.
    """

    gamma: Tensor
    auxiliary_heads: nn.Module
    _backbone: Backbone | None
    if TYPE_CHECKING:
        training: bool

        def _active_config(self) -> ObjectiveConfig: ...
        def heads_for_training(self) -> AuxiliaryHeads: ...

    def _begin_objective(self) -> None:
        self._progress = Progress()
        self._backbone = None
        self._auxiliary_loss_enabled = True
        self._fast_paths_enabled = True
        self._told_by: weakref.ref | None = None
        self._warned_of: set[str] = set()

    def _register_gamma(self: Any, device: torch.device) -> None:
        self.register_buffer("gamma", torch.ones((), dtype=torch.float32, device=device), persistent=False)

    def set_training_progress(self, step: int, total_steps: int | None = None) -> None:
        """Tell the schedule the current step.

        `CAFTCallback` does it for Trainer; a bare loop calls it before each step.

        Args:
            step: s, number of optimizer steps done so far.
            total_steps: S, that of the whole run; None takes the configuration's.

        Raises:
            ValueError: if S is unknown or not positive, or s is negative.
        """
        self._progress.set(step, total_steps)
        trainer = running_trainer()
        self._told_by = None if trainer is None else weakref.ref(trainer)
        self._update_gamma(self._active_config())

    def forget_training_progress(self) -> None:
        """End a run: the next one must tell its own progress."""
        self._progress = Progress()
        self._told_by = None

    def what_is_missing(self) -> str | None:
        """What the enabled auxiliary loss lacks since `set_training_progress`, or None.

        ``"loss"`` if it was not computed, ``"backward"`` if no backward pass has reached one.
        """
        progress = self._progress
        if not self._auxiliary_loss_enabled:
            return None
        return "loss" if not progress.computed else "backward" if progress.trained < progress.computed else None

    def read_metrics(self) -> dict[str, float]:
        """``gamma``, and the losses since the last call as `RecentLosses.read` names them, nats."""
        losses = self._progress.recent.read(self._active_config().aux_loss_decay)
        return {"gamma": float(self.gamma)} | losses

    def _update_gamma(self, config: ObjectiveConfig) -> None:
        # .data, since module.to(bfloat16) may have cast the buffer, and gamma needs its digits.
        self.gamma.data = torch.full_like(self.gamma, self._progress.gamma(config), dtype=torch.float32)

    def auxiliary_loss_enabled(self, enabled: bool) -> AbstractContextManager[None]:
        """Within the block, compute the auxiliary loss or not."""
        return _switched(self, "_auxiliary_loss_enabled", enabled)

    def fast_paths_enabled(self, enabled: bool) -> AbstractContextManager[None]:
        """Within the block, compute the losses fast, or plainly, to compare.

        Plainly, the model computes all its logits and its own loss, heads compute all logits at
        once and decoder layers for all positions, and autograd computes all gradients.
        """
        return _switched(self, "_fast_paths_enabled", enabled)

    def _wants_auxiliary_loss(self) -> bool:
        return self.training and torch.is_grad_enabled() and self._auxiliary_loss_enabled

    @torch.compiler.disable
    def _training_pass(self, kwargs: dict[str, Any]) -> TrainingPass | None:
        """The call of the base model with the auxiliary loss, for `run`; None if it gets none."""
        if not self._wants_auxiliary_loss() or not self._trainer_wants_auxiliary_loss():
            return None
        _refuse_parts_of_rows(kwargs)
        if kwargs.get("labels") is None:
            return None
        _require_labels_of_tokens(kwargs)
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel: got copies of the model in one process, expected one process per GPU. Start with `accelerate "
                "launch` or `torchrun`, or choose one GPU with CUDA_VISIBLE_DEVICES."
            )
        config = self._active_config()
        heads = self.heads_for_training()
        self._progress.begin_forward(config)
        self._update_gamma(config)
        if config.aux_loss_weight == 0:
            self._progress.nothing_to_train()
            return None
        return self._with_auxiliary_loss(config, heads, kwargs)

    def _trainer_wants_auxiliary_loss(self) -> bool:
        """Whether the running Trainer, if any, trains on the next-token loss; else warn once."""
        trainer = running_trainer()
        if self._told_by is not None and (trainer is None or self._told_by() is not trainer):
            self.forget_training_progress()  # of a run that was interrupted
        if trainer is None:
            return True
        if trains_on_next_tokens(trainer):
            require_usual_loss(trainer.args)
            return True
        if (name := type(trainer).__name__) not in self._warned_of:
            self._warned_of.add(name)
            warnings.warn(
                f"{name}: the auxiliary loss of CAFT is off, since this trainer has another loss than the next-token loss beside "
                "which it is defined. The model trains as without CAFT. transformers' Trainer and TRL's SFTTrainer train it.",
                stacklevel=2,
            )
        return False

    def _with_auxiliary_loss(
        self, config: ObjectiveConfig, heads: AuxiliaryHeads, kwargs: dict[str, Any]
    ) -> TrainingPass:
        assert self._backbone is not None
        supervision = Supervision.of(  # before the model runs, while the host need not wait long for the device
            kwargs["labels"],
            len(heads.heads),
            kwargs,
            config.aux_token_fraction,
            self._progress.forward_seed(),
        )
        own: SupervisedPass
        if kwargs.get("fused_lm_head"):  # TRL's SFTTrainer computes its loss from log-probabilities
            own = yield from log_probs_pass(self._backbone, kwargs, supervision.next_token)
        else:
            own = yield from next_token_pass(self._backbone, kwargs, supervision.next_token, self._fast_paths_enabled)
        self._warn_of_changed_parts()
        auxiliary = auxiliary_loss(
            heads,
            self._backbone,
            own.captured,
            supervision,
            decay=config.aux_loss_decay,
            weight=config.aux_loss_weight * self.gamma / own.divisor,
            fast_paths=self._fast_paths_enabled,
        )
        self._progress.auxiliary_loss_computed(auxiliary, own.supervised)
        return own.with_auxiliary(auxiliary.total)

    def _warn_of_changed_parts(self) -> None:
        """Warn once if an adapter changes a part behind the layers; the heads use its old form."""
        assert self._backbone is not None
        for name in set(self._backbone.adapted_parts()) - self._warned_of:
            self._warned_of.add(name)
            warnings.warn(
                f"{name}: an adapter changes it (modules_to_save, trainable_token_indices, target_modules, or a tied embedding). The "
                f"auxiliary heads keep using the base model's frozen {name}, so no auxiliary gradient reaches the change, "
                "and they aim at the old rows of trained tokens.",
                stacklevel=2,
            )


@contextmanager
def _switched(objective: AuxiliaryObjective, name: str, enabled: bool) -> Iterator[None]:
    before = getattr(objective, name)
    setattr(objective, name, enabled)
    try:
        yield
    finally:
        setattr(objective, name, before)


@torch.compiler.disable(recursive=False)  # the base model that it calls is compiled
def run(training_pass: TrainingPass, model: Callable[..., Any]) -> Any:
    """Call ``model`` as ``training_pass`` wants, and return the outputs for the caller."""
    try:
        return finish(training_pass, model(**begin(training_pass)), model)
    finally:
        training_pass.close()  # its hooks would stay for as long as somebody keeps the traceback of an exception


@torch.compiler.disable(recursive=False)
def finish(training_pass: TrainingPass, outputs: Any, model: Callable[..., Any]) -> Any:
    """Continue `run` after the first call of ``model``, which returned ``outputs``."""
    try:
        while True:
            done, value = _advance(training_pass, outputs)
            if done:
                return value
            outputs = model(**value)
    finally:
        training_pass.close()


@torch.compiler.disable
def begin(training_pass: TrainingPass) -> dict[str, Any]:
    """Keyword arguments for the first call of the model."""
    return next(training_pass)


@torch.compiler.disable  # the losses have sizes that depend on the data, and a backward pass inside
def _advance(training_pass: TrainingPass, outputs: Any) -> tuple[bool, Any]:
    """Whether the pass ended, and the outputs for the caller, or the next keyword arguments."""
    try:
        return False, training_pass.send(outputs)
    except StopIteration as end:
        return True, end.value


def named_arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``model`` by name."""
    if not args:
        return kwargs
    forward = type(model).forward.__get__(model)  # not what TRL or accelerate put in its place
    return inspect.signature(forward).bind_partial(*args).arguments | kwargs


def _refuse_parts_of_rows(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for parts of sequences, in which a head lacks what comes before or after.

    Context and sequence parallelism pass ``shift_labels``.
    """
    if kwargs.get("shift_labels") is not None:
        raise ValueError(
            "shift_labels: given, expected labels alone. Under context or sequence parallelism (cp_size or sp_size > 1) the "
            "tokens that a head predicts lie in other processes, which CAFT does not support. Set both sizes to 1, or wrap "
            "the step in auxiliary_loss_enabled(False)."
        )
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: given in training, expected none: the heads would not see the tokens in the cache. Pass whole "
            "sequences, or wrap the step in auxiliary_loss_enabled(False)."
        )


def _require_labels_of_tokens(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError unless ``labels`` are ``(batch, tokens)``, as the tokens are."""
    labels, tokens = kwargs["labels"], kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    expected = "(batch, tokens)" if tokens is None else tuple(tokens.shape[:2])
    if labels.dim() != 2 or (tokens is not None and tuple(labels.shape) != expected):
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {expected}, one for each token, -100 where there is none."
        )


def heads_are_never_missing(module: nn.Module, incompatible: Any) -> None:
    """Hook after loading a state dict: PEFT and transformers would warn that it lacks the heads."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if HEADS_PREFIX not in key]
