"""The plan of ``peft-caft compare``: what is read, what is refused, and which runs follow from it."""

from pathlib import Path

import pytest
import yaml

from peft_caft.evaluation.comparison_plan import read_plan
from peft_caft.evaluation.comparison_runs import Workplace, final_runs, tuning_runs
from peft_caft.evaluation.equal_flops import ratio
from peft_caft.planning.flops import ModelShapes
from peft_caft.training.data import EncodedData

from ..support.places import EXAMPLES

PLAN = {
    "model": "org/model",
    "task": "task.py",
    "sizes": {"train": 12, "dev": 4, "test": 6},
    "settings": {"heads": "org/heads", "r": 4},
    "training": {"num_train_epochs": 2},
    "seeds": [1, 2],
    "tuning": {"seed": 0, "learning_rates": ["1e-4", 1.0e-3]},
    "arms": {
        "lora": {"label": "LoRA", "settings": {"method": "lora"}},
        "caft": {"label": "CAFT"},
        "fresh": {"settings": {"heads": None}, "learning_rates": ["5e-4"]},
        "flops": {"settings": {"method": "lora"}, "flops_of": "caft"},
        "adapted": {"adapt_heads": {"num_train_epochs": 1}},
    },
    "scales": {"small": {"sizes": {"train": 3}, "seeds": [5], "arms": ["lora", "flops"]}},
}


def plan_file(folder: Path, **changes) -> Path:
    (folder / "task.py").touch()
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return folder / "plan.yaml"


def test_arms_have_what_is_common_and_their_own(tmp_path):
    plan = read_plan(plan_file(tmp_path))
    assert plan.task == str(tmp_path / "task.py")
    assert [arm.name for arm in plan.arms] == list(PLAN["arms"])
    assert plan.arm("caft").settings == {"heads": "org/heads", "r": 4}
    assert plan.arm("fresh").settings == {"heads": None, "r": 4}
    assert plan.arm("lora").settings == {"method": "lora", "r": 4}  # which has no heads
    assert plan.arm("caft").training == {"num_train_epochs": 2}
    assert plan.arm("caft").learning_rates == (1e-4, 1e-3)  # YAML takes 1e-4 for a text
    assert plan.arm("fresh").learning_rates == (5e-4,)
    assert (plan.arm("caft").label, plan.arm("flops").label) == ("CAFT", "flops")


def test_scale_puts_its_values_in_place_of_the_plans(tmp_path):
    plan = read_plan(plan_file(tmp_path), "small")
    assert plan.sizes == {"train": 3, "dev": 4, "test": 6}
    assert plan.seeds == (5,)
    assert [arm.name for arm in plan.arms] == ["lora", "flops"]
    assert [arm.name for arm in plan.references] == ["caft"]  # counted, not run


def test_model_heads_and_data_can_be_others(tmp_path):
    plan = read_plan(plan_file(tmp_path), None, "other/model", "other/heads", str(tmp_path))
    assert (plan.model, plan.data) == ("other/model", str(tmp_path))
    assert [plan.arm(name).settings.get("heads") for name in ("lora", "caft", "fresh")] == [None, "other/heads", None]


def test_runs_tune_from_a_seed_of_their_own_and_then_go_through_all_arms_of_a_seed(tmp_path):
    plan = read_plan(plan_file(tmp_path))
    tuning = tuning_runs(plan)
    assert {run.seed for run in tuning} == {0}
    assert [(run.arm.name, run.learning_rate) for run in tuning] == [
        (name, rate) for name in ("lora", "caft", "flops", "adapted") for rate in (1e-4, 1e-3)
    ]
    chosen = {"lora": 1e-3, "caft": 1e-4, "fresh": 5e-4, "flops": 1e-4, "adapted": 1e-3}
    runs = final_runs(plan, chosen)
    assert [(run.seed, run.arm.name) for run in runs] == [(seed, name) for seed in (1, 2) for name in PLAN["arms"]]
    assert all(run.learning_rate == chosen[run.arm.name] for run in runs)
    assert len({run.path for run in [*tuning, *runs]}) == 8 + 10
    assert runs[1].path == Path("runs/caft/lr-0.0001/seed-1")


def test_arms_of_a_seed_differ_in_what_they_are_for_alone(tmp_path):
    plan = read_plan(plan_file(tmp_path))
    place = Workplace(plan, tmp_path, tmp_path / "train.jsonl", tmp_path / "dev.jsonl", {"flops": 1.5})
    lora, caft, fresh, flops, adapted = final_runs(plan, dict.fromkeys(PLAN["arms"], 1e-3))[:5]
    settings = {run.arm.name: vars(place.settings_of(run)) for run in (lora, caft, fresh, flops, adapted)}
    for name, changed in (
        ("caft", {"method", "heads"}),
        ("fresh", {"method"}),
        ("flops", set()),
        ("adapted", {"method", "heads"}),
    ):
        others = settings[name]
        assert {k for k in others if others[k] != settings["lora"][k]} == {"output", *changed}
    assert settings["adapted"]["heads"] == str(tmp_path / "heads" / "adapted")
    assert place.training_of(caft) == place.training_of(lora)
    assert place.training_of(lora) == {"num_train_epochs": 2, "learning_rate": 1e-3, "seed": 1}
    assert place.training_of(flops) == place.training_of(lora) | {"num_train_epochs": 3.0}


def test_arms_share_heads_that_are_adapted_alike(tmp_path):
    adapt = {"num_train_epochs": 1}
    arms = {
        "lora": {"settings": {"method": "lora"}},
        "one": {"settings": {"heads": "h"}, "adapt_heads": adapt},
        "fewer": {"settings": {"heads": "h", "num_auxiliary_heads": 1}, "adapt_heads": adapt},
        "longer": {"settings": {"heads": "h"}, "adapt_heads": {"num_train_epochs": 2}},
        "new": {"settings": {"heads": None, "num_auxiliary_heads": 2}, "adapt_heads": adapt},
        "fewer-new": {"settings": {"heads": None, "num_auxiliary_heads": 1}, "adapt_heads": adapt},
        "as-they-are": {"settings": {"heads": "h"}},
    }
    plan = read_plan(plan_file(tmp_path, arms=arms))
    place = Workplace(plan, Path("out"), Path("train"), Path("dev"), {})
    heads = {arm.name: place.heads_for(arm) for arm in plan.arms}
    assert heads == {
        "lora": None,
        "one": "out/heads/one",
        "fewer": "out/heads/one",
        "longer": "out/heads/longer",
        "new": "out/heads/new",
        "fewer-new": "out/heads/fewer-new",
        "as-they-are": "h",
    }


def test_more_steps_where_the_plan_counts_steps(tmp_path):
    plan = read_plan(plan_file(tmp_path, training={"max_steps": 10}))
    place = Workplace(plan, tmp_path, tmp_path, tmp_path, {"flops": 1.26})
    steps = [place.training_of(run)["max_steps"] for run in final_runs(plan, dict.fromkeys(PLAN["arms"], 1e-3))[:5]]
    assert steps == [10, 10, 10, 13, 10]


def test_ratio_of_operations_is_the_one_counted_by_hand():
    shapes = ModelShapes(
        hidden_size=2, vocab_size=10, num_layers=1, layer_weights=8, last_layer_weights=8, key_value_weights=2,
        attention_width=2, adapter_weights=1,
    )  # fmt: skip
    rows = [{"input_ids": [0] * 4, "labels": [-100, -100, -100, 1]}]  # a quarter is supervised, 2 keys a query
    lora = 4 * 8 + 6 * 1 + 3 * (4 * 2 * 2) + 0.25 * 4 * 20
    heads = 3 * (0.25 * 4 * 20 + 0.25 * 4 * 4)  # unembedding and W of (2, 2), forward and backward
    assert ratio(shapes, EncodedData(rows, 0, 0), "residual", 3, 1, 1.0) == pytest.approx((lora + heads) / lora)
    assert ratio(shapes, EncodedData(rows, 0, 0), "residual", 3, 1, 0.5) == pytest.approx((lora + heads / 2) / lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "plan: got the key 'seed', expected some of model, task"),
        ({"task": None}, "task: got None, expected a text"),
        ({"seeds": 3}, "seeds: got 3, expected different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], expected different"),
        ({"tuning": {"seed": 2, "learning_rates": [1e-3]}}, "tuning.seed: got 2, which is one of seeds"),
        ({"tuning": {"learning_rates": 1e-3}}, "tuning.learning_rates: got 0.001, expected a list"),
        ({"tuning": {"learning_rates": ["fast"]}}, "tuning.learning_rates: got 'fast', expected a number"),
        ({"sizes": {"train": 1, "dev": 1}}, "sizes.test: got None, expected a number of rows"),
        (
            {"settings": {"rank": 8}},
            "settings: got the key 'rank', expected some of heads, heads_revision, num_auxiliary_heads",
        ),
        ({"settings": {"output": "x"}}, "settings: got the key 'output'"),
        ({"settings": {"r": "8"}}, "settings.r: got '8', expected a whole number"),
        ({"settings": {"method": "dora"}}, "settings.method: got 'dora', expected 'caft' or 'lora'"),
        ({"training": {"epochs": 3}}, "training: --epochs: unknown option"),
        ({"training": {"seed": 3}}, "training.seed: the plan sets it"),
        ({"evaluation": {"batchsize": 3}}, "evaluation: got the key 'batchsize'"),
        ({"arms": {}}, "arms: got none"),
        ({"arms": {"a/b": {}}}, "arms: got the name 'a/b'"),
        ({"arms": {"a": {"lr": 1}}}, "arms.a: got the key 'lr', expected some of label"),
        ({"arms": {"a": {"settings": {"method": "lora", "heads": "x"}}}}, "arms.a: got heads with method='lora'"),
        ({"arms": {"a": {"settings": {"method": "lora"}, "adapt_heads": {}}}}, "arms.a: got heads with method='lora'"),
        ({"arms": {"a": {"settings": {"method": "lora"}, "flops_of": "b"}}}, "arms.a.flops_of: got 'b'"),
        ({"arms": {"a": {}, "b": {"flops_of": "a"}}}, "arms.b.flops_of: got 'a' for method='caft'"),
        ({"arms": {"a": {}, "b": {"settings": {"r": 9}}}}, r"arms.b.settings.r: got 9, expected 4 as in a"),
        (
            {"arms": {"a": {}, "b": {"training": {"gradient_accumulation_steps": 2}}}},
            "arms.b.training.gradient_accumulation_steps: got 2, expected None as in a: arms are paired",
        ),
    ],
)
def test_mistake_in_a_plan_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(plan_file(tmp_path, **changes))


def test_default_that_is_written_out_is_no_difference(tmp_path):
    arms = {"a": {}, "b": {"settings": {"max_length": 512}, "training": {"per_device_train_batch_size": 8}}}
    assert len(read_plan(plan_file(tmp_path, arms=arms)).arms) == 2


def test_scale_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="scale: got 'huge', expected one of 'small'"):
        read_plan(plan_file(tmp_path), "huge")
    file = plan_file(tmp_path, scales={"small": {"arms": ["lora", "dora"]}})
    with pytest.raises(ValueError, match=r"scales.small.arms: got \['lora', 'dora'\], expected a list of some of"):
        read_plan(file, "small")
    with pytest.raises(FileNotFoundError, match=r"plan: .* is not a file"):
        read_plan(tmp_path / "no.yaml")


@pytest.mark.parametrize(("scale", "arms", "seeds"), [("smoke", 7, 1), ("cpu", 2, 3), ("gpu", 7, 5)])
def test_plan_of_the_molecules_has_its_scales(scale, arms, seeds):
    plan = read_plan(EXAMPLES / "molecules" / "compare.yaml", scale, model="org/model")
    assert (len(plan.arms), len(plan.seeds)) == (arms, seeds)
    assert Path(plan.task) == EXAMPLES / "molecules" / "task.py"
    assert Path(plan.arm("caft").settings["heads"]).is_dir()
    if scale == "gpu":
        assert plan.sizes == {"train": 15_000, "dev": 500, "test": 1_000}
