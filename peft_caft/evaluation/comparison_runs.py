"""One run of a comparison: fine-tune an arm from one seed, answer one split; taken up where it was,
and done once.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..basics.files import read_json
from ..basics.run_folder import RunFolder
from ..training.arguments import trainer_arguments
from ..training.defaults import STAGE_1, STAGE_2
from ..training.fine_tuning import fine_tune
from ..training.head_training import train_heads
from ..training.settings import FineTuningSettings, HeadTrainingSettings
from .comparison_plan import PAIRED_SETTINGS, PAIRED_TRAINING, Arm, ComparisonPlan
from .comparison_values import options_of
from .evaluation import RECORD_NAME, ROWS_NAME, evaluate
from .settings import EvaluationSettings


@dataclass(frozen=True)
class Run:
    """An arm with one learning rate, from one seed."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Inside the comparison's folder."""
        return Path("runs", self.arm.name, f"lr-{self.learning_rate:g}", f"seed-{self.seed}")

    def describe(self) -> str:
        return f"{self.arm.label}, learning rate {self.learning_rate:g}, seed {self.seed}"


def tuning_runs(plan: ComparisonPlan) -> list[Run]:
    """From the seed of tuning; arms that have nothing to choose need none."""
    arms = [arm for arm in plan.arms if len(arm.learning_rates) > 1]
    return [Run(arm, rate, plan.tuning_seed) for arm in arms for rate in arm.learning_rates]


def final_runs(plan: ComparisonPlan, chosen: dict[str, float]) -> list[Run]:
    """All arms of a seed before the next seed, so that what is finished early can be compared."""
    return [Run(arm, chosen[arm.name], seed) for seed in plan.seeds for arm in plan.arms]


@dataclass(frozen=True)
class Workplace:
    """What runs share.

    Attributes:
        output: the comparison's folder.
        train: file of training rows.
        dev: file of rows that learning rates are chosen by.
        more_steps: by arm with ``flops_of``, how many times as long it trains.
    """

    plan: ComparisonPlan
    output: Path
    train: Path
    dev: Path
    more_steps: dict[str, float]

    def is_done(self, run: Run, split: str) -> bool:
        """Whether it has answered the split."""
        return (self.output / run.path / split / RECORD_NAME).exists()

    def heads_for(self, arm: Arm) -> str | None:
        """Heads to train with; for an arm with ``adapt_heads`` those that `adapt` makes: in the
        folder of the first arm with the same.
        """
        if arm.adapt_heads is None:
            return arm.settings.get("heads")
        first = next(other for other in self.plan.arms if _adapted_alike(arm, other))
        return str(self.output / "heads" / first.name)

    def adapt(self, arm: Arm) -> None:
        """Train heads on the task's own data, once, from the seed of tuning: all seeds start from
        these, and all arms with the same.
        """
        output, plan = self.heads_for(arm), self.plan
        if arm.adapt_heads is None or output is None or RunFolder(Path(output)).summary_path.exists():
            return
        heads = arm.settings.get("heads")
        settings = HeadTrainingSettings(
            model=plan.model,
            data=[str(self.train)],
            output=output,
            eval_data=[str(self.dev)],
            eval_rows=plan.sizes["dev"],
            init_heads=heads,
            num_heads=_number_of_new_heads(arm),
            targets="hard",  # the base model itself need not know the task
            max_length=arm.settings.get("max_length", FineTuningSettings.max_length),
            max_rows=plan.sizes["train"],
            dtype=arm.settings.get("dtype", FineTuningSettings.dtype),
        )
        training = {"seed": plan.tuning_seed} | arm.adapt_heads
        train_heads(settings, trainer_arguments(output, STAGE_1, options=options_of(training)))
        free_memory()

    def settings_of(self, run: Run) -> FineTuningSettings:
        own = run.arm.settings
        heads = {"heads": self.heads_for(run.arm)} if own.get("method", "caft").startswith("caft") else {}
        return FineTuningSettings(
            model=self.plan.model,
            data=str(self.train),
            output=str(self.output / run.path / "adapter"),
            max_rows=self.plan.sizes["train"],
            **own | heads,
        )

    def training_of(self, run: Run) -> dict[str, Any]:
        training = dict(run.arm.training) | {"learning_rate": run.learning_rate, "seed": run.seed}
        if (times := self.more_steps.get(run.arm.name)) is not None:
            if int(training.get("max_steps", -1)) > 0:
                training["max_steps"] = round(int(training["max_steps"]) * times)
            else:
                epochs = float(training.get("num_train_epochs", STAGE_2["num_train_epochs"]))
                training["num_train_epochs"] = epochs * times
        return training

    def train_run(self, run: Run) -> None:
        """Fine-tune, unless it is done."""
        settings = self.settings_of(run)
        if RunFolder(Path(settings.output)).summary_path.exists():
            return
        self.adapt(run.arm)
        arguments = trainer_arguments(settings.output, STAGE_2, options=options_of(self.training_of(run)))
        fine_tune(settings, arguments)
        free_memory()

    def evaluate_run(self, run: Run, data: Path, split: str, answers: bool = True) -> None:
        """Answer the rows of a split, or only score their references, unless it is done."""
        if self.is_done(run, split):
            return
        trained = self.settings_of(run)
        options = dict(self.plan.evaluation)
        if not answers:
            options["answers"] = False
        settings = EvaluationSettings(
            task=self.plan.task,
            data=str(data),
            output=str(self.output / run.path / split),
            model=trained.output if trained.trains_all else self.plan.model,
            adapter=None if trained.trains_all else trained.output,
            max_rows=self.plan.sizes[split],
            **options,
        )
        evaluate(settings)
        free_memory()

    def dev_loss(self, run: Run) -> float:
        """Cross entropy of the reference answers of dev, nats/token; trains and evaluates what is
        missing.

        The model does not answer: that costs the most time, and nothing is chosen by it.
        """
        self.train_run(run)
        self.evaluate_run(run, self.dev, "dev", answers=False)
        return read_json(self.output / run.path / "dev" / RECORD_NAME)["metrics"]["cross_entropy"]["mean"]


def _number_of_new_heads(arm: Arm) -> int | None:
    """Pretrained ones are adapted all, however many of them the arm uses."""
    return None if arm.settings.get("heads") else arm.settings.get("num_auxiliary_heads")


def _adapted_alike(arm: Arm, other: Arm) -> bool:
    """Whether two arms are given the same heads by `Workplace.adapt`."""
    return (
        arm.adapt_heads == other.adapt_heads
        and _number_of_new_heads(arm) == _number_of_new_heads(other)
        and all(arm.settings.get(name) == other.settings.get(name) for name in ("heads", "max_length", "dtype"))
    )


def require_paired(folders: list[Path]) -> None:
    """Check, by what they recorded, that runs of one seed had the same data, their order and
    initial adapter.

    Raises:
        ValueError: naming the field and the runs.
    """
    names = ("data_sha256", "max_rows", "seed", "data_seed", "processes", *PAIRED_SETTINGS, *PAIRED_TRAINING)
    first, *others = [(folder, read_json(RunFolder(folder / "adapter").settings_path)) for folder in folders]
    for folder, record in others:
        for name in names:
            if record.get(name) != first[1].get(name):
                raise ValueError(
                    f"{name}: got {record.get(name)!r} in {folder} and {first[1].get(name)!r} in {first[0]}, expected the same in all runs of "
                    "a seed. Remove the folder that does not belong to this plan."
                )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``rows.jsonl``."""
    return [json.loads(line) for line in (folder / ROWS_NAME).read_text(encoding="utf-8").splitlines()]


def free_memory() -> None:
    """Of the run that has ended: models hold references in circles, and the next one needs the
    room.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
