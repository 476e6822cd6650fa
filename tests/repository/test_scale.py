"""`benchmarks/scale.py`, on a small model and on 7B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scale
from transformers import LlamaConfig

from peft_caft.planning.communication import Communication
from peft_caft.planning.plan import GIB, METHODS

from ..support.engines import SIZES, accelerate_wraps_so

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")]
SMALL = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
SETTINGS = replace(scale.SETTINGS, tokens=32, batch_size=2, gpus=4)


@accelerate_wraps_so
def test_a_step_of_7b_sends_what_is_published():
    row, worst = next(scale.compared("Llama-2 7B", scale.MODELS["Llama-2 7B"]))
    assert abs(worst) < scale.CLAIM
    assert float(row[3]) > 10  # GB, of 13.5 GB of parameters


@accelerate_wraps_so
def test_a_wrong_sum_is_noticed(monkeypatch):
    monkeypatch.setattr(scale, "communication", lambda *args: Communication(1.0, 1.0, 1.0))
    assert all(worst > 1 for _, worst in scale.compared("small", SMALL, SETTINGS))


@accelerate_wraps_so
def test_the_page_says_what_was_planned(tmp_path):
    found = scale.planned(SMALL, SETTINGS)
    least = min(option.memory.total for option in found.options) / GIB
    tight = replace(found, settings=replace(SETTINGS, gpu_memory=0.5 + 1.06 * least))
    text = scale.page({"small": tight}, list(scale.compared("small", SMALL, SETTINGS)))
    assert "Simulated, not measured" in text
    assert str(tmp_path.parent) not in text
    cells = [line.split("|")[4:7] for line in scale.memory_table(tight).splitlines()[2:]]
    assert len(cells) == 4 * 2 * 2
    assert {cell.strip()[0] for row in cells for cell in row} == {"(", "0"}
    rows = scale.communication_table({"small": tight}).splitlines()[2:]
    assert len(rows) == 2 + 2 * 2
    assert all("(+0.0%)" in row for row in rows[:2])
    assert all(row.count("(+") == len(METHODS) - 1 and "(+0.0%)" not in row for row in rows[2:])
    scale.plot({"small": tight}, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
