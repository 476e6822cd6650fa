"""Settings of ``peft-caft evaluate``. It imports no torch."""

from dataclasses import dataclass

from ..basics.checks import require_choices, require_counts
from ..basics.settings import ANSWERS, DATA, same_setting, setting
from ..training.settings import DistillationSettings, FineTuningSettings, Precision

ANSWERS_ALONE = ("max_new_tokens", "temperature", "seed")  # have no use without answers


@dataclass
class EvaluationSettings:
    """What to evaluate, and how; each field is an option of ``peft-caft evaluate``.

    Raises:
        ValueError: if a field is out of range.
    """

    task: str = setting("Python file with the task, such as examples/molecules/task.py.", group=DATA)
    data: str = setting("Rows to answer, JSONL, as the task's file builds them (test.jsonl).", group=DATA)
    output: str = same_setting(FineTuningSettings, "output")
    model: str | None = setting(
        "Model, folder or Hub id; with --adapter its base. [default: the one that the adapter names]", None, group=DATA
    )
    adapter: str | None = setting("LoRA or CAFT adapter, folder or Hub id; plain PEFT loads it.", None, group=DATA)
    max_rows: int | None = setting("Rows to use at most, the first ones; all if unset.", None, group=DATA)
    dtype: Precision = same_setting(DistillationSettings, "dtype")
    answers: bool = setting(
        "Let the model answer; without, only the cross entropy of the references is measured, which takes much less time.",
        True,
        group=ANSWERS,
    )
    max_new_tokens: int | None = setting("Longest answer in tokens. [default: the task's own]", None, group=ANSWERS)
    temperature: float = setting(
        "0 takes the most probable token; 1 samples from the model's distribution.", 0.0, group=ANSWERS
    )
    seed: int = setting("Seed of the sampling, where --temperature is above 0.", 0, group=ANSWERS)
    batch_size: int = setting("Rows at a time.", 16)

    def __post_init__(self) -> None:
        require_choices(self)
        require_counts(self, "max_rows", "max_new_tokens", "batch_size")
        for name in ANSWERS_ALONE:
            if not self.answers and getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with --no-answers, which has no use for it. Leave it out."
                )
