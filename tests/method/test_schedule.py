"""gamma(s) has the values of its formulas."""

from __future__ import annotations

import math

import pytest

from peft_caft.method.schedule import gamma


@pytest.mark.parametrize(
    ("schedule", "start", "third", "end"),
    [
        ("reflected_sine", 1.0, math.sin(math.pi / 3), 0.0),
        ("sine", 0.0, math.sin(math.pi / 6), 1.0),
        ("linear", 0.0, 1 / 3, 1.0),
        ("linear_decay", 1.0, 2 / 3, 0.0),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_schedule_has_the_papers_values(schedule, start, third, end):
    values = [gamma(schedule, step, 9) for step in (0, 3, 9, 20)]
    assert values == pytest.approx([start, third, end, end], abs=1e-12)


@pytest.mark.parametrize(("step", "total", "name"), [(0, 0, "total_steps"), (-1, 5, "step")])
def test_impossible_progress_is_refused(step, total, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        gamma("sine", step, total)
