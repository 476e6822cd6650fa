"""A task: rows to train and test on, and what is measured of an answer. A user adds one by writing
one file.

    class Arithmetic(Task):
        name = "arithmetic"
        metrics = (Metric("exact", "share of answers that are the reference"),)
        sizes = {"train": 1000, "dev": 100, "test": 200}
        ...

    TASK = Arithmetic()
    if __name__ == "__main__":
        build_main(TASK)  # of peft_caft.evaluation.task_building

The file builds its data (``python task.py --output FOLDER``) and is given to ``peft-caft evaluate
--task task.py``. See examples/maths.
"""

from __future__ import annotations

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

CUT_SHARES = ((0, "0 %"), (0.5, "up to 50 %"), (0.75, "up to 75 %"), (1 - 1e-9, "up to 99 %"), (1, "100 %"))
Row = dict[str, Any]
Scores = dict[str, list[float | None]]
INSTALL = "Run `pip install 'peft-caft[tasks]'`, and see the README.md beside the task for what it needs besides."


@dataclass(frozen=True)
class Metric:
    """One number per row.

    Attributes:
        name: key of the number.
        meaning: in words, for the report.
        unit: ``"share"`` is shown in per cent.
        higher_is_better: which way is better.
        per_token: rows weigh by the tokens of their reference, so that the mean is one over tokens.
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
        rows: of each split, in an order in which the first rows stand for all; of a form that
            `peft_caft.training.data` reads, with whatever fields the metrics need besides.
        sources: where the rows come from, with versions.
        notes: anything else for the record.
    """

    rows: dict[str, list[Row]]
    sources: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """See the module's docstring. The class attributes have no defaults where none is meant.

    Attributes:
        name: for records.
        metrics: what `score` gives.
        sizes: rows of each split unless told otherwise.
        max_new_tokens: longest answer in tokens.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    sizes: ClassVar[dict[str, int]]
    max_new_tokens: ClassVar[int] = 64

    @abstractmethod
    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        """Rows of each split, the same for the same sizes and versions of the sources.

        Args:
            sizes: rows wanted of each split; fewer than that is refused later.
            cache: folder for what takes long to make.
        """

    def keys(self, row: Row) -> dict[str, str]:
        """What no two splits may share, such as ``{"scaffold": "c1ccccc1"}``; a build that does is
        refused.
        """
        return {"prompt": prompt_of(row)}

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        """A value for each metric and row, None where it is not defined."""

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """By what results are split, and where the row belongs: ``{"generator": "chain_sum"}``."""
        return {}


def chat(system: str, user: str, assistant: str) -> Row:
    """The usual form of a row."""
    contents = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def answer_of(row: Row) -> str:
    """The reference answer."""
    return row["messages"][-1]["content"] if "messages" in row else row["completion"]


def prompt_of(row: Row) -> str:
    """What is asked, without what is the same in all rows of a chat: its last message before the
    answer.
    """
    return row["messages"][-2]["content"] if "messages" in row else row["prompt"]


def share_of_cut_words(text: str, tokenizer: PreTrainedTokenizerBase, shortest: int = 3) -> str:
    """Which share of a text's words the tokenizer cuts, for `Task.groups`: concepts in fragments
    are what CAFT is about.

    Args:
        shortest: letters of a word; shorter ones do not count.

    Returns:
        ``"0 %"``, ``"up to 50 %"`` ... ``"100 %"``, or ``"no words"``.
    """
    words = re.findall(rf"[^\W\d_]{{{shortest},}}", text)
    if not words:
        return "no words"
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    share = sum(len(ids) > 1 for ids in pieces) / len(words)
    return next(name for limit, name in CUT_SHARES if share <= limit)


def load_task(path: str | Path) -> Task:
    """The ``TASK`` of a Python file, which may import its neighbours; those of tasks loaded
    together need names of their own.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if it needs a package that is not installed.
        TypeError: if it has no ``TASK`` that is a `Task`.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(
            f"task: {path} is not a file, expected a Python file with TASK = ..., a peft_caft.evaluation.task.Task."
        )
    name = f"peft_caft_task_{file_sha256(path)[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TypeError(f"task: got {path.name}, expected a Python file, named with .py.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"task: {path.name} needs {error.name!r}, which is not installed. {INSTALL}"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise TypeError(
            f"task: TASK of {path} is {task!r}, expected an instance of peft_caft.evaluation.task.Task. Write TASK = YourTask() at its end."
        )
    return task
