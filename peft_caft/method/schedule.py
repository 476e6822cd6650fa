"""gamma(s): how the weight of the auxiliary loss moves over a training run.

``s`` is the number of optimizer steps done, ``S`` that of the whole run. CAFT (arXiv 2506.07833)
fades the auxiliary loss out with a *reflected sine*, so that the run ends with the next-token loss
alone. The other schedules are in the authors' code too (commit d10c79e), except ``linear_decay``.
"""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["reflected_sine", "sine", "linear", "linear_decay", "constant"]
SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "reflected_sine": lambda done: math.sin(math.pi / 2 * (1 - done)),
    "sine": lambda done: math.sin(math.pi / 2 * done),
    "linear": lambda done: done,
    "linear_decay": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def gamma(schedule: Schedule, step: int, total_steps: int) -> float:
    """Weight of the auxiliary loss, in [0, 1], after ``step`` of ``total_steps`` optimizer steps.

    Steps beyond ``total_steps`` keep the last value.

    Raises:
        ValueError: if ``total_steps`` is not positive or ``step`` is negative.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: got {total_steps}, expected at least 1 optimizer step.")
    if step < 0:
        raise ValueError(f"step: got {step}, expected 0 (the first optimizer step) or more.")
    return SCHEDULES[schedule](min(step / total_steps, 1.0))
