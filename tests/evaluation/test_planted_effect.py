"""`compare` finds an effect where one is planted, and none where looking ahead shows nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_caft.basics.intervals import excludes_zero
from peft_caft.evaluation.comparison import compare
from peft_caft.evaluation.comparison_plan import read_plan
from peft_caft.evaluation.task import load_task

from ..support.places import EXAMPLES

PLANTED = EXAMPLES / "planted"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("planted") / "model"
    environment = os.environ | {"PYTHONPATH": str(PLANTED.parent.parent)}
    subprocess.run([sys.executable, str(PLANTED / "make_model.py"), str(folder)], check=True, env=environment)
    return str(folder)


def test_only_the_words_ahead_differ():
    sizes = {"train": 300, "test": 50}
    ahead, blind = (load_task(PLANTED / name).build(sizes, Path()).rows for name in ("ahead.py", "blind.py"))
    said = [int(row["completion"].split()[1][4]) == row["kind"] for row in ahead["train"]]
    assert all(said)
    said = [int(row["completion"].split()[1][4]) == row["kind"] for row in blind["train"]]
    assert sum(said) / 300 == pytest.approx(1 / 6, abs=0.07)
    for rows in (ahead, blind):
        named = [row["completion"].split()[0] == f"name{row['kind']}" for row in rows["train"]]
        assert sum(named) / 300 == pytest.approx(0.25 + 0.75 / 6, abs=0.09)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["ahead", "blind"])
def test_planted_effect_is_found_and_none_where_there_is_none(model, scale, tmp_path):
    plan = read_plan(PLANTED / "compare.yaml", scale, model=model)
    found = compare(plan, tmp_path)["metrics"]["kind"]["arms"]["caft"]
    wins = excludes_zero(found["difference"]["low"], found["difference"]["high"]) and found["difference"]["mean"] > 0
    assert wins == (scale == "ahead")
