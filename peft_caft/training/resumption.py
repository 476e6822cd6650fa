"""What makes a resumed run end as an unbroken one, where Trainer does not.

The order of the rows depends on the seed and the epoch alone, no step is taken too many, no
evaluation is left out, and the seconds are those of all parts of the run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..basics.checkpoints import readable
from ..basics.contents import contents_of
from ..basics.provenance import source_name
from ..basics.run_folder import RunFolder
from .arguments import identity
from .engine import engine_name
from .settings import FineTuningSettings, HeadTrainingSettings


def settings_of_run(
    settings: FineTuningSettings | HeadTrainingSettings, args: TrainingArguments, hashes: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the result of a run, and that it must be resumed with.

    What is hashed goes without its folder, which may have been moved.

    Args:
        hashes: those of the data files.
    """
    found = asdict(settings) | identity(args) | hashes
    # The number of processes decides the batches, and no engine reads another one's checkpoints.
    found |= {"processes": args.world_size, "engine": engine_name(args)}
    for name in {"model", "heads", "init_heads"} & found.keys():
        if (source := found[name]) is not None:
            found |= contents_of(name, source, found.get("heads_revision") if name == "heads" else None)
            found[name] = source_name(source)
    for name in ("data", "eval_data"):
        if (path := found[name]) is not None:
            found[name] = Path(path).name if isinstance(path, str) else [Path(one).name for one in path]
    del found["output"]
    return found


def begun(
    folder: RunFolder, settings: dict[str, Any], args: TrainingArguments, overwrite: bool, needed: tuple[str, ...]
) -> Path | None:
    """The checkpoint to resume from: the first process begins the run, and tells the others."""
    found = [folder.begin(settings, overwrite, needed) if args.process_index == 0 else None]
    return broadcast_object_list(found)[0]


@dataclass(eq=False, repr=False)
class EpochOrder(Sampler[int]):
    """Shuffled rows; or shuffled batches of rows of about equal length, the longest batch first.

    A resumed run must see the order in which it was interrupted, or it sees some rows of that epoch
    twice and others never. transformers' length-grouped sampler draws from the global generator,
    and accelerate tells a sampler its epoch only in a run of one process (transformers 5.23,
    accelerate 1.15). That sampler also returns fifty batches in a row from long to short, and the
    loss swings with them where long rows differ in kind from short ones.

    Attributes:
        lengths: length of each row in tokens; None shuffles the rows.
        batch_size: rows per optimizer step over all processes, which have about equal length.
        epoch: returns the current epoch, from 0.
    """

    lengths: list[int] | None
    rows: int
    batch_size: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first batch holds the longest row, so that too little memory shows at once. The last
        # one may be smaller than the others, so it stays last.
        first, *others = (indices[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size))
        last = others.pop() if others else []
        order = torch.randperm(len(others), generator=generator).tolist()
        return chain(first, *(others[index] for index in order), last)


class ResumableTrainer(Trainer):
    """A Trainer that takes no step after the last one, counts the seconds of all parts, and names a
    checkpoint whose files it cannot use.

    Attributes:
        ordered: values of ``train_sampling_strategy`` for which `EpochOrder` orders the rows.
    """

    ordered: tuple[str, ...] = ("group_by_length",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Clock())
        self.add_callback(_SaveAfterEvaluation())

    @property
    def clock(self) -> "Clock":
        """Restored callbacks are new objects, so that it is looked for."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, Clock))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs and self.clock.before:  # means and speeds of the last part alone
            logs = {name: value for name, value in logs.items() if not name.startswith("train_")}
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy not in self.ordered:
            return super()._get_train_sampler(train_dataset)
        rows: Any = getattr(self.train_dataset, "rows", self.train_dataset)  # without reading cached hidden states
        lengths = [len(row["input_ids"]) for row in rows]
        return EpochOrder(
            lengths if self.args.train_sampling_strategy == "group_by_length" else None,
            len(rows),
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lambda: int(self.state.epoch or 0),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # If a run was interrupted after its last step, Trainer (5.23) would take one step more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable("output", str(resume_from_checkpoint), "a checkpoint"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable("output", str(checkpoint), "a checkpoint"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable("output", str(checkpoint), "a checkpoint"):
            super()._load_rng_state(checkpoint)


class Clock(TrainerCallback, ExportableState):
    """Counts seconds from the first step on, which is after the evaluation at the start.

    Checkpoints keep them. What was lost in an interruption does not count.

    Attributes:
        before: seconds up to the checkpoint from which a run was resumed.
    """

    def __init__(self) -> None:
        self.before = 0.0
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.started is None else time.perf_counter() - self.started)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"before": self.seconds}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Trainer itself restores callbacks only when told to.
        kept = state.stateful_callbacks.get("Clock", {}) if state.global_step else {}
        self.before, self.started = kept.get("attributes", {}).get("before", 0.0), None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.started or time.perf_counter()


class _SaveAfterEvaluation(TrainerCallback):
    """Puts the checkpoint of a step that ends an epoch after the epoch's evaluation.

    Trainer (5.23) saves it before. A run that is resumed from it leaves out the evaluation, and so
    the random numbers that it draws: the dropout of all later steps would be another one.
    """

    def __init__(self) -> None:
        self.postponed = False

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        ends_epoch = state.global_step >= state.max_steps or (state.epoch or 0) % 1 == 0
        if args.eval_strategy == "epoch" and ends_epoch and control.should_save:
            self.postponed, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.postponed
        self.postponed = False
