"""``peft-caft compare``: fine-tunes arms from the same seeds and gives paired differences.

First each arm's learning rate is chosen by the cross entropy of the dev answers, from a separate
seed, and written to ``choice.json``. The test rows are read only after that, so they cannot change
the choice. Each run has its own folder: a finished run is not repeated, and an interrupted one is
resumed. Several processes, such as one per GPU, may share a comparison: each takes a free run.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..basics.adapters import tokenizer_of
from ..basics.contents import contents_of
from ..basics.files import file_sha256, write_text
from ..basics.provenance import provenance, source_name
from ..basics.reading import is_file, read_json, understood
from ..basics.run_folder import RunFolder
from ..training.data import encode, read_jsonl
from ..training.settings import FineTuningSettings
from .comparison_plan import Arm, ComparisonPlan
from .comparison_report import markdown_report, summarise, summarise_groups
from .comparison_runs import Run, Workplace, final_runs, read_rows, require_paired, tuning_runs
from .comparison_values import SPLITS, number
from .equal_flops import equal_flops
from .report import metrics_of
from .task import Task, load_task
from .task_building import RECORD_NAME, build_task

CHOICE_NAME, RATIOS_NAME = "choice.json", "equal_flops.json"
REPORT_NAME, PLOT_NAME = "comparison.md", "comparison.png"
SECONDS_BETWEEN_LOOKS = 1.0  # while other processes hold all runs that are left


def compare(plan: ComparisonPlan, output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Carry out a plan. An interrupted comparison is resumed.

    Args:
        overwrite: replace a comparison that the folder holds.

    Returns:
        the contents of ``summary.json``: chosen rates, costs, means and differences of the arms.

    Raises:
        FileExistsError: if the folder holds a comparison with another plan.
        FileNotFoundError: if there is no such task or data.
        ModuleNotFoundError: if the task needs a package that is not installed.
        TypeError: if the task's file holds no task.
        ValueError: if data or results cannot be used.
        ChildProcessError: if runs failed; the others are finished.
    """
    output = Path(output)
    task = load_task(plan.task)
    metrics_of(task)  # refuses a taken name before any work
    folder = RunFolder(output)
    with folder.held(wait=True):
        if overwrite:
            _discard(output)
        data = _data(plan, task, output)
        data_sha256 = {split: file_sha256(path) for split, path in data.items()}
        record: dict[str, Any] = {
            "plan": plan.record(),
            "task_sha256": file_sha256(plan.task),
            "data_sha256": data_sha256,
        }
        heads = {(str(h), arm.settings.get("heads_revision")) for arm in plan.arms if (h := arm.settings.get("heads"))}
        record["contents"] = [
            contents_of("model", plan.model),
            *(contents_of(h, h, at, "heads") for h, at in sorted(heads, key=str)),
        ]
        if (found := folder.result_of(record)) is not None:
            return found
        folder.begin(record)
        place = Workplace(plan, output, data["train"], data["dev"], _more_steps(plan, data["train"], output))
    chosen = _chosen(place)
    _test(place, chosen, data["test"])
    with folder.held(wait=True):
        if not folder.summary_path.exists():
            with understood(output):
                found = _summary(place, task, chosen, data_sha256)
            write_text(output / REPORT_NAME, markdown_report(found))
            _plot(output, found)
            folder.finish(found)
    return read_json(folder.summary_path)


def choose(losses: dict[float, float]) -> float:
    """The learning rate with the lowest dev cross entropy, among those whose run did not diverge.

    Args:
        losses: learning rate -> cross entropy, nats/token; NaN or infinite where the run diverged.

    Raises:
        ValueError: if all runs diverged.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"learning_rates: got dev cross entropies {losses}, expected a number. Add smaller rates.")
    return min(finite, key=lambda rate: (finite[rate], rate))


def _chosen(place: Workplace) -> dict[str, float]:
    """Arm -> learning rate; a choice that was written before stays."""
    path = place.output / CHOICE_NAME
    if not path.exists():
        losses: dict[str, dict[float, float]] = {}

        def tune(run: Run) -> None:
            losses.setdefault(run.arm.name, {})[run.learning_rate] = place.dev_loss(run)

        _carry_out("Choosing learning rates on dev", place, tuning_runs(place.plan), "dev", tune)
        chosen, dev = {}, {}
        for arm in place.plan.arms:  # in this order, so that all processes write the same file
            if arm.name in losses:
                dev[arm.name] = sorted(losses[arm.name].items())
            chosen[arm.name] = choose(losses[arm.name]) if arm.name in losses else arm.learning_rates[0]
        choice = {"chosen": chosen, "dev_cross_entropy": dev, "seed": place.plan.tuning_seed}
        write_text(path, json.dumps(choice, indent=2) + "\n")
    with understood(path):
        chosen = read_json(path)["chosen"]
        return {arm.name: number(f"{path}: chosen.{arm.name}", chosen[arm.name]) for arm in place.plan.arms}


def _test(place: Workplace, chosen: dict[str, float], data: Path) -> None:
    """Train with the chosen rates and answer the test rows, which are read nowhere else."""

    def test(run: Run) -> None:
        place.train_run(run)
        place.evaluate_run(run, data, "test")

    runs = final_runs(place.plan, chosen)
    _carry_out("Training and testing", place, runs, "test", test)
    for seed in place.plan.seeds:
        require_paired([place.output / run.path for run in runs if run.seed == seed])


def _carry_out(what: str, place: Workplace, runs: list[Run], split: str, work: Callable[[Run], None]) -> None:
    """Do all runs in turn. A failed one stops no other; those of other processes are awaited."""
    failed: list[tuple[Run, Exception]] = []
    started, before = time.perf_counter(), sum(place.is_done(run, split) for run in runs)
    waiting = runs
    while waiting:
        elsewhere = []
        for run in sorted(waiting, key=lambda run: not place.is_done(run, split)):
            try:
                with RunFolder(place.output / run.path).held():
                    seconds, done = time.perf_counter() - started, sum(place.is_done(run, split) for run in runs)
                    bar = tqdm.format_meter(done, len(runs), seconds, ncols=72, unit=" runs", initial=before)
                    print(f"\n{what}: {run.describe()}\n{bar}", flush=True)
                    work(run)
            except BlockingIOError:
                elsewhere.append(run)
            except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
                failed.append((run, error))
                print(f"Failed: {error}", flush=True)
        if len(elsewhere) == len(waiting):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        elif elsewhere:
            print(f"\n{what}: other processes hold {len(elsewhere)} runs", flush=True)
        waiting = elsewhere
    if failed:
        _, cause = failed[0]
        raise ChildProcessError(
            f"{len(failed)} of {len(runs)} runs failed ({', '.join(str(run.path) for run, _ in failed)} in {place.output}); the first: "
            f"{type(cause).__name__}: {cause} The others are finished: fix the cause and run the same command again."
        ) from cause


def _data(plan: ComparisonPlan, task: Task, output: Path) -> dict[str, Path]:
    folder = output / "data" if plan.data is None else Path(plan.data)
    if plan.data is None and not is_file(folder / RECORD_NAME):
        build_task(task, folder, plan.sizes)
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for split, path in files.items():
        rows = len(read_jsonl(path, plan.sizes[split]))
        if rows < plan.sizes[split]:
            raise ValueError(
                f"sizes.{split}: got {plan.sizes[split]:,}, expected at most {rows:,}, which {path} has. Lower it, or build more rows."
            )
    return files


def _more_steps(plan: ComparisonPlan, train: Path, output: Path) -> dict[str, float]:
    """Arm with ``flops_of`` -> how many times as long it trains; counted once, kept in a file."""
    path = output / RATIOS_NAME
    arms = [arm for arm in plan.arms if arm.flops_of is not None]
    if arms and not path.exists():
        ratios = {arm.name: equal_flops(plan, plan.arm(str(arm.flops_of)), train) for arm in arms}
        write_text(path, json.dumps(ratios, indent=2) + "\n")
    return read_json(path) if arms else {}


def _summary(place: Workplace, task: Task, chosen: dict[str, float], data_sha256: dict[str, str]) -> dict[str, Any]:
    plan, results, costs, commits = place.plan, {}, {}, set()
    tokens = _tokens_of_an_epoch(place)
    for arm in plan.arms:
        folders = [place.output / run.path for run in final_runs(plan, chosen) if run.arm == arm]
        results[arm.name] = [read_rows(folder / "test") for folder in folders]
        summaries = [read_json(RunFolder(folder / "adapter").summary_path) for folder in folders]
        costs[arm.name] = _costs(summaries, tokens)
        commits |= {summary["git_commit"] for summary in summaries}
    return {
        "task": task.name,
        "model": source_name(plan.model),
        "sizes": plan.sizes,
        "seeds": list(plan.seeds),
        "data_sha256": data_sha256,
        "arms": {
            arm.name: {"label": arm.label, "learning_rate": chosen[arm.name]} | _settings(arm) | costs[arm.name]
            for arm in plan.arms
        },
        "times_the_steps": place.more_steps,
        "tuning": read_json(place.output / CHOICE_NAME),
        "metrics": summarise(metrics_of(task), results),
        "groups": summarise_groups(metrics_of(task), results),
        "git_commits_of_runs": sorted(map(str, commits)),
        **provenance(),
    }


def _settings(arm: Arm) -> dict[str, Any]:
    settings = dict(arm.settings)
    if heads := settings.get("heads"):
        settings["heads"] = source_name(heads)
    return {"settings": settings, "training": arm.training, "adapt_heads": arm.adapt_heads}


def _tokens_of_an_epoch(place: Workplace) -> int:
    rows = read_jsonl(place.train, place.plan.sizes["train"])
    max_length = place.plan.arms[0].settings.get("max_length", FineTuningSettings.max_length)  # the same in all arms
    return encode(rows, tokenizer_of(place.plan.model), max_length).tokens


def _costs(summaries: list[dict[str, Any]], tokens: int) -> dict[str, float]:
    """Means over seeds: optimizer steps, epochs, seconds, and tokens of the training rows."""
    epochs = fmean([max(entry["epoch"] for entry in summary["log_history"]) for summary in summaries])
    return {
        "steps": fmean([max(entry["step"] for entry in summary["log_history"]) for summary in summaries]),
        "epochs": epochs,
        "train_seconds": fmean([summary["train_seconds"] for summary in summaries]),
        "tokens": round(epochs * tokens),
    }


def _plot(output: Path, found: dict[str, Any]) -> None:
    from .comparison_plots import plot_comparison

    plot_comparison(output / PLOT_NAME, found)


def _discard(output: Path) -> None:
    """Remove only what a comparison made in the folder, or raise an error if one runs in it."""
    for lock in output.glob("runs/*/*/*/.lock"):
        with RunFolder(lock.parent).held():
            pass
    for name in ("runs", "heads", "data"):
        shutil.rmtree(output / name, ignore_errors=True)
    folder = RunFolder(output)
    made = (output / name for name in (CHOICE_NAME, RATIOS_NAME, REPORT_NAME, PLOT_NAME))
    for path in (*made, folder.settings_path, folder.summary_path):
        path.unlink(missing_ok=True)
