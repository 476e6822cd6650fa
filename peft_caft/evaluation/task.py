"""A task: rows to train and test on, and the metrics of an answer. A user adds one in one file.

    class Arithmetic(Task):
        name = "arithmetic"
        metrics = (Metric("exact", "share of answers that are the reference"),)
        sizes = {"train": 1000, "dev": 100, "test": 200}
        ...

    TASK = Arithmetic()
    if __name__ == "__main__":
        build_main(TASK)  # of peft_caft.evaluation.task_building

``python task.py --output FOLDER`` builds its data, ``peft-caft evaluate --task task.py`` uses it.
"""

import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..basics.files import file_sha256
from ..basics.reading import require_file
from ..training.chats import content_text, prompt_and_answer

CUT_SHARES = ((0, "0 %"), (0.5, "up to 50 %"), (0.75, "up to 75 %"), (1 - 1e-9, "up to 99 %"), (1, "100 %"))
Row = dict[str, Any]
Scores = dict[str, list[float | None]]
INSTALL = "Run `pip install 'peft-caft[tasks]'`, and see the README.md beside the task for what it needs besides."


@dataclass(frozen=True)
class Metric:
    """One number per row.

    Attributes:
        meaning: description for the report.
        unit: ``"share"`` is shown in per cent.
        per_token: whether rows are weighted by the tokens of their reference.
    """

    name: str
    meaning: str
    unit: str = "share"
    higher_is_better: bool = True
    per_token: bool = False


@dataclass(frozen=True)
class Splits:
    """What a task builds.

    Attributes:
        rows: rows of each split, in an order in which the first ones are a fair sample. They have a
            form that `peft_caft.training.data` reads, and further fields that the metrics need.
        sources: name -> version of each source of the rows.
        notes: further entries of the record.
    """

    rows: dict[str, list[Row]]
    sources: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Rows and metrics of one task; the module's docstring shows an example.

    Attributes:
        name: name in records and reports.
        metrics: the metrics that `score` returns.
        sizes: default number of rows of each split.
        max_new_tokens: longest answer in tokens.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    sizes: ClassVar[dict[str, int]]
    max_new_tokens: ClassVar[int] = 64

    @abstractmethod
    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        """Build the rows; the same sizes and versions of the sources give the same rows.

        Args:
            sizes: number of rows of each split; fewer are refused.
            cache: folder for what takes long to make.
        """

    def keys(self, row: Row) -> dict[str, str]:
        """Keys that no two splits may share, such as ``{"scaffold": "c1ccccc1"}``."""
        return {"prompt": prompt_of(row)}

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        """For each metric, one value per row; None where it is not defined."""

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Groups by which results are split, and the row's value, as ``{"digits": "3"}``."""
        return {}


def chat(system: str, user: str, assistant: str) -> Row:
    """A row with a system message, a question and its reference answer."""
    contents = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def answer_of(row: Row) -> str:
    """The reference answer: the text of the last one."""
    _, answer = prompt_and_answer(row)
    return answer if isinstance(answer, str) else content_text(answer[-1])


def prompt_of(row: Row) -> str:
    """The question: the last message of a chat before the answer, or the whole prompt."""
    prompt, _ = prompt_and_answer(row)
    return prompt if isinstance(prompt, str) else content_text(prompt[-1])


def share_of_cut_words(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Share of a text's words (three letters or more) that the tokenizer cuts, for `Task.groups`.

    Returns:
        ``"0 %"``, ``"up to 50 %"`` ... ``"100 %"``, or ``"no words"``.
    """
    words = re.findall(r"[^\W\d_]{3,}", text)
    if not words:
        return "no words"
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    share = sum(len(ids) > 1 for ids in pieces) / len(words)
    return next(name for limit, name in CUT_SHARES if share <= limit)


def load_task(path: str | Path) -> Task:
    """Load the ``TASK`` of a Python file.

    It may import its neighbours, whose names must differ among tasks that are loaded together.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the file needs a package that is not installed.
        TypeError: if the file has no ``TASK`` that is a `Task`.
    """
    path = Path(path).resolve()
    require_file("task", path, "a Python file with TASK = ..., a peft_caft.evaluation.task.Task")
    name = f"peft_caft_task_{file_sha256(path)[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TypeError(f"task: got {path.name}, expected a Python file, named with .py.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"task: {path.name} needs {error.name!r}, which is missing. {INSTALL}") from error
    finally:
        sys.path.remove(str(path.parent))
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise TypeError(
            f"task: TASK of {path} is {task!r}, expected an instance of peft_caft.evaluation.task.Task. Write TASK = YourTask() at its end."
        )
    return task
