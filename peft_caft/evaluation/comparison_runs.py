"""One resumable run of a comparison: fine-tunes an arm from one seed and answers one split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ..basics.files import file_sha256
from ..basics.reading import is_file, json_lines, read_json
from ..basics.run_folder import RunFolder
from ..training.arguments import trainer_arguments
from ..training.defaults import STAGE_1, STAGE_2
from ..training.fine_tuning import fine_tune
from ..training.head_training import train_heads
from ..training.settings import FineTuningSettings, HeadTrainingSettings, unused_settings
from .comparison_plan import PAIRED_SETTINGS, PAIRED_TRAINING, Arm, ComparisonPlan
from .comparison_values import options_of
from .evaluation import RECORD_NAME, ROWS_NAME, evaluate
from .settings import ANSWERS_ALONE, EvaluationSettings


@dataclass(frozen=True)
class Run:
    """An arm with one learning rate, from one seed."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def path(self) -> Path:
        """The run's folder, inside the comparison's."""
        return Path("runs", self.arm.name, f"lr-{self.learning_rate:g}", f"seed-{self.seed}")

    def describe(self) -> str:
        return f"{self.arm.label}, learning rate {self.learning_rate:g}, seed {self.seed}"


def tuning_runs(plan: ComparisonPlan) -> list[Run]:
    """Runs from the seed of tuning, for arms with two learning rates or more."""
    arms = [arm for arm in plan.arms if len(arm.learning_rates) > 1]
    return [Run(arm, rate, plan.tuning_seed) for arm in arms for rate in arm.learning_rates]


def final_runs(plan: ComparisonPlan, chosen: dict[str, float]) -> list[Run]:
    """Runs with the chosen rates, seed by seed, so that early results can be compared."""
    return [Run(arm, chosen[arm.name], seed) for seed in plan.seeds for arm in plan.arms]


@dataclass(frozen=True)
class Workplace:
    """Plan, files and folder of a comparison, in which its runs are done.

    Attributes:
        dev: file of rows that decide the learning rates.
        more_steps: arm with ``flops_of`` -> how many times as long it trains.
    """

    plan: ComparisonPlan
    output: Path
    train: Path
    dev: Path
    more_steps: dict[str, float]

    def is_done(self, run: Run, split: str) -> bool:
        """Whether the run has answered the split."""
        return (self.output / run.path / split / RECORD_NAME).exists()

    def heads_for(self, arm: Arm) -> str | None:
        """Folder or Hub id of the heads to train with; equal ``adapt_heads`` share one folder."""
        if arm.adapt_heads is None:
            return arm.settings.get("heads")
        first = next(other for other in self.plan.arms if _adapted_alike(arm, other))
        return str(self.output / "heads" / first.name)

    def adapt(self, arm: Arm) -> None:
        """Train heads on the task's data once, for all seeds and all arms that share them."""
        output, plan = self.heads_for(arm), self.plan
        if arm.adapt_heads is None or output is None or RunFolder(Path(output)).is_finished():
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
        heads = {"heads": self.heads_for(run.arm)} if run.arm.method.startswith("caft") else {}
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
        """Fine-tune, unless it was done before."""
        settings = self.settings_of(run)
        if RunFolder(Path(settings.output)).is_finished():
            return
        self.adapt(run.arm)
        arguments = trainer_arguments(settings.output, STAGE_2, options=options_of(self.training_of(run)))
        fine_tune(settings, arguments)
        free_memory()

    def evaluate_run(self, run: Run, data: Path, split: str, answers: bool = True) -> None:
        """Answer the rows of a split, or only score the references, unless it was done before."""
        if self.is_done(run, split):
            return
        trained = self.settings_of(run)
        settings = EvaluationSettings(
            task=self.plan.task,
            data=str(data),
            output=str(self.output / run.path / split),
            model=trained.output if trained.trains_all else self.plan.model,
            adapter=None if trained.trains_all else trained.output,
            max_rows=self.plan.sizes[split],
            **(self.plan.evaluation if answers else _without_answers(self.plan.evaluation)),
        )
        evaluate(settings)
        free_memory()

    def dev_loss(self, run: Run) -> float:
        """Cross entropy of the reference answers of dev, nats/token, after training if needed.

        The model does not answer, since that takes the most time and decides nothing.
        """
        self.train_run(run)
        self.evaluate_run(run, self.dev, "dev", answers=False)
        return read_json(self.output / run.path / "dev" / RECORD_NAME)["metrics"]["cross_entropy"]["mean"]


def _without_answers(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name not in ANSWERS_ALONE} | {"answers": False}


def _number_of_new_heads(arm: Arm) -> int | None:
    """Number of heads to make; None for pretrained heads, all of which are adapted."""
    return None if arm.settings.get("heads") else arm.settings.get("num_auxiliary_heads")


def _adapted_alike(arm: Arm, other: Arm) -> bool:
    """Whether `Workplace.adapt` makes the same heads for two arms."""
    return (
        arm.adapt_heads == other.adapt_heads
        and _number_of_new_heads(arm) == _number_of_new_heads(other)
        and all(arm.settings.get(name) == other.settings.get(name) for name in ("heads", "max_length", "dtype"))
    )


def require_paired(folders: list[Path]) -> None:
    """Raise a ValueError if runs of one seed differ in data, order or initial adapter."""
    names = ("data_sha256", "max_rows", "seed", "data_seed", "processes", *PAIRED_SETTINGS, *PAIRED_TRAINING)
    first, *others = [(folder, read_json(RunFolder(folder / "adapter").settings_path)) for folder in folders]
    for folder, record in others:
        unused = {name for one in (record, first[1]) for name in unused_settings(one.get("method", "caft"))}
        for name in names:
            if name not in unused and record.get(name) != first[1].get(name):
                raise ValueError(
                    f"{name}: got {record.get(name)!r} in {folder} and {first[1].get(name)!r} in {first[0]}, expected the same in all runs of "
                    "a seed. Remove the folder that does not belong to this plan."
                )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``rows.jsonl`` in an evaluation's folder; a ValueError if it was changed."""
    path, record = folder / ROWS_NAME, read_json(folder / RECORD_NAME)
    if not is_file(path) or record.get("rows_sha256", digest := file_sha256(path)) != digest:
        raise ValueError(
            f"{path}: not what was written, by its hash in {RECORD_NAME}. Remove {folder} to evaluate again."
        )
    return [row for _, row in json_lines(path)]


def free_memory() -> None:
    """Free the memory of a finished run. Models hold reference cycles, which only gc collects."""
    clear_device_cache(garbage_collection=True)
