"""``peft-caft compare`` on a tiny checkpoint: what is run, in which order, what is chosen by what, and what is said of it."""

import json
import shutil
import struct
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from peft_caft.basics.intervals import excludes_zero, paired_difference
from peft_caft.basics.run_folder import RunFolder
from peft_caft.evaluation import comparison, comparison_plots, comparison_runs
from peft_caft.evaluation.comparison import choose, compare
from peft_caft.evaluation.comparison_plan import read_plan
from peft_caft.evaluation.comparison_plots import plot_comparison
from peft_caft.evaluation.comparison_report import markdown_report, summarise, summarise_groups
from peft_caft.evaluation.task import Metric

from ..support import toy_task
from ..support.commands import peft_caft
from ..support.forked_command import start
from ..support.tiny_checkpoint import save_checkpoint

TOY = Path(toy_task.__file__)
PLAN = {
    "model": "model",
    "task": str(TOY),
    "sizes": {"train": 12, "dev": 4, "test": 6},
    "settings": {"max_length": 64, "r": 4},
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 2,
        "warmup_steps": 0,
    },
    "evaluation": {"batch_size": 4},
    "seeds": [1, 2],
    "tuning": {"seed": 0, "learning_rates": ["1e-3", "1e-2"]},
    "arms": {
        "lora": {"label": "LoRA", "settings": {"method": "lora"}},
        "caft": {"label": "CAFT", "settings": {"aux_loss_weight": 0.5}},
    },
}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def plan_file(folder: Path, **changes) -> Path:
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of the plan and the model, the comparison in it, and what was printed."""
    folder = tmp_path_factory.mktemp("comparison")
    save_checkpoint(folder / "model")
    printed = peft_caft("compare", str(plan_file(folder)), "--output", str(folder / "out"))
    return folder, folder / "out", printed


def test_each_arm_is_tested_with_what_its_dev_rows_chose(made):
    _, output, _ = made
    choice = json.loads((output / "choice.json").read_text())
    for arm in ("lora", "caft"):
        runs = output / "runs" / arm
        dev = {
            rate: json.loads((runs / f"lr-{rate}" / "seed-0" / "dev" / "evaluation.json").read_text())["metrics"]
            for rate in (0.001, 0.01)
        }
        losses = {rate: metrics["cross_entropy"]["mean"] for rate, metrics in dev.items()}
        assert losses[0.001] != losses[0.01]
        assert choice["dev_cross_entropy"][arm] == [[rate, loss] for rate, loss in losses.items()]
        best = choice["chosen"][arm]
        assert losses[best] == min(losses.values())
        tested = {path.relative_to(runs) for path in runs.glob("*/*/test")}
        assert tested == {Path(f"lr-{best}/seed-{seed}/test") for seed in (1, 2)}


def test_report_holds_what_the_rows_say(made):
    _, output, printed = made
    found = json.loads((output / "summary.json").read_text())
    rate = {arm: found["arms"][arm]["learning_rate"] for arm in ("lora", "caft")}
    rows = {arm: [lines(output / f"runs/{arm}/lr-{rate[arm]}/seed-{seed}/test") for seed in (1, 2)] for arm in rate}
    losses = {arm: [[loss for row in own for loss in row["answer_losses"]] for own in rows[arm]] for arm in rows}
    means = {arm: [sum(own) / len(own) for own in losses[arm]] for arm in losses}
    metric = found["metrics"]["cross_entropy"]["arms"]
    for arm in means:
        assert metric[arm]["by_seed"] == pytest.approx(means[arm], rel=1e-5)
        assert metric[arm]["mean"]["mean"] == pytest.approx(sum(means[arm]) / 2, rel=1e-5)
    difference = (sum(means["caft"]) - sum(means["lora"])) / 2
    assert difference != 0
    assert metric["caft"]["difference"]["mean"] == pytest.approx(difference, abs=1e-6)
    assert metric["lora"]["difference"] is None
    assert found["arms"]["lora"]["steps"] == 3
    assert found["arms"]["lora"]["epochs"] == 1
    assert found["arms"]["caft"]["settings"] == {"max_length": 64, "r": 4, "aux_loss_weight": 0.5}
    assert (output / "comparison.md").read_text(encoding="utf-8") in printed
    assert "| CAFT " in printed


def test_plot_is_not_blank(made):
    picture = matplotlib.image.imread(made[1] / "comparison.png")
    assert picture[..., :3].std() > 0.02
    width, height = struct.unpack(">II", (made[1] / "comparison.png").read_bytes()[16:24])
    assert width > 1000 < height


def test_auxiliary_loss_of_no_weight_makes_no_difference_at_all(made, tmp_path):
    """So initial adapter and order of the data are the same in the arms of a seed."""
    folder, *_ = made
    arms = {"lora": PLAN["arms"]["lora"], "off": {"settings": {"aux_loss_weight": 0.0}}}
    changes = {"seeds": [3], "arms": arms, "tuning": {"learning_rates": ["1e-2"]}, "model": str(folder / "model")}
    found = compare(read_plan(plan_file(tmp_path, **changes)), tmp_path / "out")
    adapters = [load_file(tmp_path / f"out/runs/{a}/lr-0.01/seed-3/adapter/adapter_model.safetensors") for a in arms]
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[0])
    difference = found["metrics"]["cross_entropy"]["arms"]["off"]["difference"]
    assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)


def without(whole: Path, output: Path, *removed: str) -> Path:
    """A copy of a comparison that lacks its result, and the files and runs of these patterns."""
    shutil.copytree(whole, output)
    for pattern in ("summary.json", "comparison.md", "comparison.png", *removed):
        for path in list(output.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return output


class Killed(BaseException):
    """What no code catches."""


def test_comparison_killed_in_a_run_and_between_runs_ends_as_an_unbroken_one(made, tmp_path, monkeypatch):
    folder, whole, _ = made
    plan, output = read_plan(folder / "plan.yaml"), without(whole, tmp_path / "out", "runs/*/*/seed-2")
    chosen = json.loads((output / "choice.json").read_text())["chosen"]
    broken = [Path(f"runs/{arm}/lr-{chosen[arm]}/seed-2") for arm in ("lora", "caft")]
    step, steps = Trainer.training_step, []

    def counted(*args, **kwargs):
        steps.append(len(steps))
        if len(steps) == 3:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    with pytest.raises(Killed):
        compare(plan, output)
    assert (output / broken[0] / "adapter" / "checkpoints" / "checkpoint-2").is_dir()
    train_run = comparison_runs.Workplace.train_run

    def killed_before_caft(place, run):
        if run.arm.name == "caft" and run.seed == 2:
            raise Killed
        train_run(place, run)

    monkeypatch.setattr(comparison_runs.Workplace, "train_run", killed_before_caft)
    with pytest.raises(Killed):
        compare(plan, output)
    monkeypatch.setattr(comparison_runs.Workplace, "train_run", train_run)
    assert len(steps) == 3 + 1  # the third step again, those before it not
    compare(plan, output)
    assert len(steps) == 3 + 1 + 3
    for path in broken:
        rows = [[row["answer_losses"] for row in lines(one / path / "test")] for one in (output, whole)]
        assert rows[0] == rows[1]
    tables = [json.loads((one / "summary.json").read_text())["metrics"] for one in (output, whole)]
    assert tables[0] == tables[1]


def test_processes_share_the_runs_of_a_comparison(made, tmp_path):
    folder, whole, _ = made
    # Two of the four runs that choose a learning rate, and two of the four that are tested.
    output = without(whole, tmp_path / "out", "choice.json", "runs/caft/*/seed-0", "runs/*/*/seed-2")
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    command = ["peft-caft", "compare", str(folder / "plan.yaml"), "--output", str(output)]
    processes = [start(command, log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        process.join(240)
        assert process.exitcode == 0, log.read_text()
    trained = [log.read_text().count("Training data:") for log in logs]
    assert sum(trained) == 4  # each run once
    assert min(trained) >= 1
    tables = [json.loads((one / "summary.json").read_text())["metrics"] for one in (output, whole)]
    assert tables[0] == tables[1]


def test_comparison_that_another_process_carries_out_is_not_overwritten(made, tmp_path):
    folder, whole, _ = made
    shutil.copytree(whole, output := tmp_path / "out")
    run = next(output.glob("runs/*/*/*"))
    with RunFolder(run).held(), pytest.raises(BlockingIOError, match="another process"):
        compare(read_plan(folder / "plan.yaml"), output, overwrite=True)
    assert (output / "summary.json").exists()
    compare(read_plan(folder / "plan.yaml"), output)


def test_finished_comparison_is_shown_again_and_another_plan_is_refused(made):
    folder, output, printed = made
    before = (output / "summary.json").stat().st_mtime_ns
    again = peft_caft("compare", str(folder / "plan.yaml"), "--output", str(output))
    assert again.strip() in printed
    assert (output / "summary.json").stat().st_mtime_ns == before
    (folder / "other").mkdir()
    other = plan_file(folder / "other", seeds=[1, 2, 3], model=str(folder / "model"))
    assert "holds a finished run" in peft_caft("compare", str(other), "--output", str(output), expect=1)


class Fakes:
    """Runs that take no time: `dev` and `test` give the cross entropy of an arm and learning rate."""

    def __init__(self, monkeypatch, dev, test):
        self.events = []
        monkeypatch.setattr(comparison_runs.Workplace, "train_run", lambda *args: self.train(*args))
        monkeypatch.setattr(comparison_runs.Workplace, "evaluate_run", lambda *args, **kw: self.evaluate(*args, **kw))
        monkeypatch.setattr(comparison, "_plot", lambda *_: None)
        self.losses = {"dev": dev, "test": test}
        self.failing = set()

    def train(self, place, run):
        self.events.append(("train", run.arm.name, run.learning_rate, run.seed))
        if run.arm.name in self.failing:
            raise RuntimeError("out of memory")
        folder = place.output / run.path / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"seed": run.seed, "r": 4}))
        log = [{"step": 3, "epoch": 1.0}]
        (folder / "summary.json").write_text(json.dumps({"log_history": log, "train_seconds": 2.0, "git_commit": "c"}))

    def evaluate(self, place, run, data, split, answers=True):
        assert answers == (split == "test")
        assert data.name == f"{split}.jsonl"
        if place.is_done(run, split):
            return
        self.events.append((split, run.arm.name, run.learning_rate, run.seed))
        loss = self.losses[split][run.arm.name][run.learning_rate]
        scores = {"exact": 0.0, "length": None, "cross_entropy": loss, "answer_cross_entropy": loss, "ended": 0.0}
        folder = place.output / run.path / split
        folder.mkdir(parents=True)
        row = json.dumps({"reference": "a", "groups": {}, "answer_losses": [loss], "scores": scores})
        (folder / "rows.jsonl").write_text(f"{row}\n{row}\n")
        (folder / "evaluation.json").write_text(json.dumps({"metrics": {"cross_entropy": {"mean": loss}}}))


DEV = {"lora": {1e-3: 1.0, 1e-2: 2.0}, "caft": {1e-3: 3.0, 1e-2: float("nan")}}
TEST = {"lora": {1e-3: 9.0, 1e-2: 0.1}, "caft": {1e-3: 9.5, 1e-2: 0.1}}  # would choose the others


def test_choice_is_by_dev_and_made_before_any_test(made, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch, DEV, TEST)
    plan = read_plan(made[0] / "plan.yaml")
    found = compare(plan, tmp_path / "out")
    assert {arm: own["learning_rate"] for arm, own in found["arms"].items()} == {"lora": 1e-3, "caft": 1e-3}
    kinds = [kind for kind, *_ in fakes.events]
    assert kinds == ["train", "dev"] * 4 + ["train", "test"] * 4
    assert {event[2:] for event in fakes.events if event[0] == "test"} == {(1e-3, 1), (1e-3, 2)}
    assert found["metrics"]["cross_entropy"]["arms"]["caft"]["difference"]["mean"] == pytest.approx(0.5)
    # Nothing that comes later changes it.
    (tmp_path / "out" / "summary.json").unlink()
    fakes.losses["dev"] = TEST
    for folder in (tmp_path / "out").glob("runs/*/*/*/dev"):
        shutil.rmtree(folder)
    assert compare(plan, tmp_path / "out")["arms"] == found["arms"]


def test_run_that_fails_is_named_and_the_others_are_done(made, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch, DEV, TEST)
    fakes.failing = {"lora"}
    plan = read_plan(made[0] / "plan.yaml")
    with pytest.raises(ChildProcessError, match=r"2 of 4 runs failed \(runs/lora/lr-0.001/seed-0, .*out of memory"):
        compare(plan, tmp_path / "out")
    assert [event[1] for event in fakes.events if event[0] == "dev"] == ["caft", "caft"]
    assert not (tmp_path / "out" / "choice.json").exists()
    fakes.failing = set()
    compare(plan, tmp_path / "out")
    assert sum(event[:2] == ("dev", "caft") for event in fakes.events) == 2  # not once more


def test_runs_that_are_no_pair_are_refused(made, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch, DEV, TEST)
    train = fakes.train

    def other_rank(place, run):
        train(place, run)
        if run.arm.name == "caft":
            (place.output / run.path / "adapter" / "run.json").write_text(json.dumps({"seed": run.seed, "r": 8}))

    monkeypatch.setattr(comparison_runs.Workplace, "train_run", other_rank)
    with pytest.raises(ValueError, match=r"r: got 8 in .*caft.* and 4 in .*lora"):
        compare(read_plan(made[0] / "plan.yaml"), tmp_path / "out")


def test_learning_rate_is_that_of_the_lowest_loss():
    assert choose({1e-3: 2.0, 1e-2: 1.0, 1e-1: float("nan")}) == 1e-2
    assert choose({1e-2: 1.0, 1e-3: 1.0}) == 1e-3
    with pytest.raises(ValueError, match="learning_rates: got dev cross entropies"):
        choose({1e-3: float("inf")})


def row(exact: float, loss: float, tokens: int, reference: str = "a", **groups: str) -> dict:
    scores = {"exact": exact, "cross_entropy": loss, "tanimoto": None if exact < 0.5 else exact}
    return {"reference": reference, "answer_losses": [loss] * tokens, "scores": scores, "groups": groups}


METRICS = (
    Metric("exact", "share"),
    Metric("cross_entropy", "of tokens", "nats/token", False, per_token=True),
    Metric("tanimoto", "similarity", "mean"),
)
RESULTS = {
    "lora": [[row(0, 2.0, 1), row(1, 1.0, 3)], [row(0, 4.0, 1), row(0, 1.0, 3)]],
    "caft": [[row(1, 1.0, 1), row(1, 1.0, 3)], [row(0, 4.0, 1), row(1, 0.0, 3)]],
}


def test_means_and_differences_are_those_computed_by_hand():
    found = summarise(METRICS, RESULTS)
    exact, loss, tanimoto = (found[name]["arms"] for name in ("exact", "cross_entropy", "tanimoto"))
    assert (exact["lora"]["mean"]["mean"], exact["caft"]["mean"]["mean"]) == (0.25, 0.75)
    assert exact["caft"]["by_seed"] == [1.0, 0.5]
    assert exact["caft"]["difference"]["mean"] == 0.5
    assert loss["lora"]["by_seed"] == [(2 + 3) / 4, (4 + 3) / 4]  # weighed by tokens
    assert loss["caft"]["difference"]["mean"] == pytest.approx(((1 + 3 + 4 + 0) - (2 + 3 + 4 + 3)) / 8)
    assert tanimoto["lora"]["by_seed"] == [1.0, None]
    assert tanimoto["caft"]["difference"]["mean"] == 0  # of the one row that both define
    expected = paired_difference([[0, 1], [0, 0]], [[1, 1], [0, 1]])
    assert (exact["caft"]["difference"]["low"], exact["caft"]["difference"]["high"]) == (expected.low, expected.high)


def test_groups_hold_the_differences_of_their_own_rows():
    def rows(*losses: float) -> list[dict]:
        kinds = ("over 8", "1 to 8", "over 8", "1 to 8", "none")
        return [row(0, loss, 1, str(i), length=kinds[i], source="x") for i, loss in enumerate(losses)]

    found = summarise_groups(
        METRICS,
        {"lora": [rows(1, 2, 3, 4, 5), rows(1, 2, 3, 4, 5)], "caft": [rows(2, 2, 3, 4, 9), rows(2, 2, 3, 4, 9)]},
    )
    lengths = found["length"]
    assert list(lengths) == ["1 to 8", "over 8"]  # in their order; a single row is no group
    assert [own["rows"] for own in lengths.values()] == [2, 2]
    differences = [own["metrics"]["cross_entropy"]["arms"]["caft"]["difference"]["mean"] for own in lengths.values()]
    assert differences == [0, 0.5]
    report = markdown_report(found_of(metric_of(0.1, 0.4)) | {"groups": found})
    assert "## Difference to LoRA by length" in report
    assert "by source" not in report  # tells no rows apart


def test_other_rows_are_refused():
    other = {"caft": [RESULTS["caft"][0], [row(0, 1.0, 1), row(0, 1.0, 3, "b")]]}
    with pytest.raises(ValueError, match="rows: 'caft', run 2, and 'lora', run 1, have different test rows"):
        summarise(METRICS, RESULTS | other)


def found_of(metrics: dict) -> dict:
    arm = {"learning_rate": 1e-3, "steps": 3, "epochs": 1.0, "train_seconds": 2.0, "tokens": 99}
    dev = {"lora": [[1e-4, 2.0], [1e-3, 1.0]], "caft": [[1e-4, 2.0], [1e-3, 1.0], [1e-2, 3.0]]}
    return {
        "task": "toy",
        "model": "tiny",
        "sizes": {"train": 12, "dev": 4, "test": 2},
        "seeds": [1, 2, 3],
        "arms": {"lora": arm | {"label": "LoRA"}, "caft": arm | {"label": "CAFT"}},
        "times_the_steps": {"lora": 1.25},
        "tuning": {"chosen": {"lora": 1e-3, "caft": 1e-3}, "dev_cross_entropy": dev, "seed": 0},
        "metrics": metrics,
        "groups": {},
        "machine": "m",
        "versions": {"python": "3"},
        "git_commit": "c",
        "git_commits_of_runs": ["c"],
    }


def metric_of(low: float, high: float) -> dict:
    def estimate(mean, low, high):
        return {"mean": mean, "low": low, "high": high}

    arms = {
        "lora": {"mean": estimate(0.25, 0.2, 0.3), "by_seed": [0.2, 0.25, 0.3], "difference": None},
        "caft": {
            "mean": estimate(0.5, 0.5, 0.5),
            "by_seed": [0.5, 0.5, None],
            "difference": estimate(0.25, low, high),
        },
    }
    return {"exact": {"meaning": "share of x", "unit": "share", "higher_is_better": True, "arms": arms}}


def test_report_marks_differences_beyond_their_interval_and_rates_at_the_edge():
    report = markdown_report(found_of(metric_of(0.1, 0.4)))
    assert "25.0% (20.0% to 30.0%)" in report
    assert "+25.0% (+10.0% to +40.0%) *" in report
    assert "| 50.0% " in report  # an interval of no width is not shown
    assert "1.0000 (edge)" in next(
        line for line in report.splitlines() if line.startswith("| LoRA") and "2.0000" in line
    )
    assert "(edge)" not in next(line for line in report.splitlines() if line.startswith("| CAFT") and "2.0000" in line)
    assert "LoRA trains 1.250 times as long" in report
    assert report.endswith("commit c.\n")
    older = found_of(metric_of(0.1, 0.4)) | {"git_commits_of_runs": ["a", "b"]}
    assert markdown_report(older).endswith("commit c, runs of commit a, b.\n")
    assert "With 3 seeds an interval is too narrow by up to 18%" in report
    assert "+25.0% (-10.0% to +40.0%) |" in markdown_report(found_of(metric_of(-0.1, 0.4)))
    assert [excludes_zero(low, high) for low, high in ((0.1, 0.2), (-0.2, -0.1), (0, 1))] == [1, 1, 0]


def test_plot_draws_each_seed_and_the_interval(monkeypatch):
    figures = []
    monkeypatch.setattr(comparison_plots, "save_figure", lambda figure, path: figures.append(figure))
    plot_comparison("plot.png", found_of(metric_of(0.1, 0.4)))
    seeds, differences = figures[0].axes
    drawn = [list(line.get_xdata()) for line in seeds.get_lines()]
    assert drawn == [[0.2, 0.25, 0.3], [0.25], [0.5, 0.5], [0.5]]
    assert [label.get_text() for label in seeds.get_yticklabels()] == ["LoRA", "CAFT"]
    assert [list(line.get_xdata()) for line in differences.get_lines()] == [[0, 0], [0.25], [0.1, 0.4]]


def test_more_rows_than_there_are_are_refused(made, tmp_path):
    folder, whole, _ = made
    sizes = {"train": 13, "dev": 4, "test": 6}
    plan = plan_file(tmp_path, sizes=sizes, model=str(folder / "model"), data=str(whole / "data"))
    message = peft_caft("compare", str(plan), "--output", str(tmp_path / "out"), expect=1)
    assert "sizes.train: got 13, expected at most 12" in message


@pytest.mark.slow
def test_every_kind_of_arm_runs(made, tmp_path):
    arms = {
        "lora": {"settings": {"method": "lora"}},
        "adapted": {"adapt_heads": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}},
        "flops": {"settings": {"method": "lora"}, "flops_of": "adapted"},
        "heads-lora": {"settings": {"train_heads": "lora"}},
        "full": {"settings": {"method": "caft_full"}},
    }
    changes = {"seeds": [1], "arms": arms, "tuning": {"learning_rates": ["1e-2"]}, "model": str(made[0] / "model")}
    found = compare(read_plan(plan_file(tmp_path, **changes)), tmp_path / "out")
    losses = {arm: own["mean"]["mean"] for arm, own in found["metrics"]["cross_entropy"]["arms"].items()}
    assert len(set(losses.values())) == 5  # none is another one's result
    times = found["times_the_steps"]["flops"]
    assert times > 1
    assert found["arms"]["flops"]["steps"] == -(-3 * times // 1)  # Trainer rounds up
    assert found["tuning"]["dev_cross_entropy"] == {}
    heads = json.loads((tmp_path / "out" / "heads" / "adapted" / "config.json").read_text())
    assert heads["training"]["targets"] == "hard"
    config = json.loads((tmp_path / "out/runs/adapted/lr-0.01/seed-1/adapter/caft_config.json").read_text())
    assert Path(config["heads"]) == tmp_path / "out" / "heads" / "adapted"
