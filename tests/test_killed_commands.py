"""Kill -9 at random moments of every long command, and the same command again: the result is that of the unbroken run.

``KILLS=20 pytest -m slow tests/test_killed_commands.py`` kills each command twenty times; ``KILLS_FROM=20`` goes on with others.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.basics.run_folder import last_whole_checkpoint
from peft_caft.evaluation.task import load_task
from peft_caft.evaluation.task_building import build_task
from peft_caft.method.callback import TRAINED_HEADS_NAME

from .support import toy_task
from .support.killed_commands import Killed, Unbroken, require_survives
from .support.tiny_checkpoint import save_checkpoint, write_chats

TOY = str(Path(toy_task.__file__))
FIRST, COUNT = int(os.environ.get("KILLS_FROM", "0")), int(os.environ.get("KILLS", "3"))
STEPS = 8
TRAINER = (
    *("--max-length", "64", "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--logging_steps", "1"),
    *("--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"),
)
PLAN = {
    "task": TOY,
    "sizes": {"train": 12, "dev": 4, "test": 6},
    "settings": {"max_length": 64, "r": 4},
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 1,
    },
    "evaluation": {"batch_size": 2},
    "seeds": [1],
    "tuning": {"seed": 0, "learning_rates": ["1e-3", "1e-2"]},
    "arms": {
        "lora": {"settings": {"method": "lora"}},
        "caft": {
            "settings": {"aux_loss_weight": 0.5},
            "adapt_heads": {
                "max_steps": 3,
                "use_cpu": True,
                "disable_tqdm": True,
                "logging_steps": 1,
                "save_steps": 1,
            },
        },
    },
}
STEPS_OF_PLAN = 6 * 3 + 3  # of six adapters and of heads

ARTIFACT = (
    "out/.*.tmp",
    "out/model.safetensors",
    "out/adapter_model.safetensors",
    "out/config.json",
    "out/tokenizer.json",
)
CHECKPOINT = "out/checkpoints/checkpoint-N"
WATCHED = (
    *(CHECKPOINT, f"{CHECKPOINT}/.*.tmp", f"{CHECKPOINT}/optimizer.pt", f"{CHECKPOINT}/rng_state*.pth"),
    *(
        f"{CHECKPOINT}/trainer_state.json",
        "out/run.json",
        "out/.run.json.*",
        "out/.summary.json.*",
        "out/summary.json",
    ),
    *ARTIFACT,
)
TRAINED = (
    "out/trained_heads",
    "out/trained_heads/.*.tmp",
    "out/trained_heads/config.json",
    f"{CHECKPOINT}/{TRAINED_HEADS_NAME}",
)
PARTS = ("out/.*.parts", "out/.*.parts/part-0.jsonl", "out/.*.tmp", "out/.*.trash")


def steps_in(run: Path, *needed: str) -> int:
    """Optimizer steps that a run goes on from."""
    if (run / "summary.json").exists():
        return max(entry["step"] for entry in json.loads((run / "summary.json").read_text())["log_history"])
    found = last_whole_checkpoint(run / "checkpoints", ("optimizer.pt", "scheduler.pt", *needed))
    return 0 if found is None else int(found.name.removeprefix("checkpoint-"))


def steps_printed(output: str) -> int:
    return len(re.findall(r"\{'loss': ", output))


def phase_of_training(folder: Path) -> str:
    out = folder / "out"
    if (out / "summary.json").exists():
        return "after the summary"
    if any((out / name).exists() for name in ("model.safetensors", "adapter_model.safetensors", "trained_heads")):
        return "final save"
    if not (out / "run.json").exists():
        return "before the run"
    begun = list((out / "checkpoints").glob("checkpoint-*"))
    if not begun:
        return "before the first checkpoint"
    newest = max(begun, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if not (newest / "trainer_state.json").exists():
        return "saving a checkpoint"
    return "after the last step" if newest.name == f"checkpoint-{STEPS}" else "between checkpoints"


def training(
    name: str, arguments: tuple[str, ...], *needed: str, watched: tuple[str, ...] = (), processes: int = 1
) -> Killed:
    saves = () if "--early-stopping-patience" in arguments else ("--save_steps", "1")  # it saves when it evaluates
    return Killed(
        name=name,
        arguments=(*arguments, "--output", "OUT/out", *TRAINER, *saves),
        done=lambda folder: steps_in(folder / "out", *needed),
        begun_at=lambda output: STEPS - steps_printed(output),
        phase=phase_of_training,
        watched=(*WATCHED, *watched),
        processes=processes,
        again=1,
    )


def answering(name: str, arguments: tuple[str, ...], rows: str, record: str, what: str, processes: int = 1) -> Killed:
    def lines(folder: Path) -> int:
        return sum(part.read_bytes().count(b"\n") for part in (folder / "out").glob(".*.parts/part-*.jsonl"))

    def finished_rows(folder: Path) -> int:
        parts = [part.read_bytes() for part in (folder / "out").glob(".*.parts/part-*.jsonl")]
        whole = [line for part in parts for line in part[: part.rfind(b"\n") + 1].splitlines()]
        return sum(len(json.loads(line)["results"]) for line in whole)

    def begun_at(output: str) -> int | None:
        bars = re.findall(rf"{what}: .*?\| (\d+)/\d+ ", output)
        return int(bars[0]) if bars and processes == 1 else None  # else the bar counts what is left

    def phase(folder: Path) -> str:
        out = folder / "out"
        if (out / record).exists():
            return "after the record"
        if (out / rows).exists():
            return "between the result and its record"
        if not list(out.glob(".*.parts/settings.json")):
            return "before the run"
        return "answering" if lines(folder) else "before the first batch"

    return Killed(name, arguments, finished_rows, begun_at, phase, (*PARTS, f"out/{rows}", f"out/{record}"), processes)


def phase_of_comparison(folder: Path) -> str:
    out = folder / "out"
    if (out / "summary.json").exists():
        return "after the summary"
    if (out / "comparison.md").exists():
        return "report"
    if not (out / "run.json").exists():
        return "building the data"
    runs = [path.parent for path in out.glob("runs/*/*/*/adapter")]
    what = "testing" if (out / "choice.json").exists() else "tuning"
    if any(not list(run.glob("*/evaluation.json")) and (run / "adapter" / "summary.json").exists() for run in runs):
        return f"{what}: evaluation"
    return f"{what}: training" if runs else "heads" if (out / "heads").exists() else "between runs"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Killed]:
    return commands_on(tmp_path_factory.mktemp("files"))


def commands_on(folder: Path) -> dict[str, Killed]:
    """The commands, by name, with what they read in ``folder``."""
    model, data = save_checkpoint(folder / "model"), write_chats(folder / "data.jsonl", 60)
    base = AutoModelForCausalLM.from_pretrained(model)
    AuxiliaryHeads.from_base_model(base, 2).save_pretrained(folder / "heads")
    tuned = get_peft_model(base, CAFTConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder / "adapter")
    build_task(load_task(TOY), folder / "task", {"test": 30})
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"model": model}, sort_keys=False))
    places = ("--model", model, "--data", data)
    train = ("train", *places, "--heads", str(folder / "heads"), "--aux-loss-weight", "0.5", "--lora-dropout", "0.1")
    train = (*train, "--num-auxiliary-heads", "2")
    evaluated = ("--eval-data", data, "--eval-rows", "8", "--eval_strategy", "steps", "--eval_steps", "3")
    stage_1 = ("train-heads", *places, "--num-heads", "2", "--eval_steps", "2", "--aux-token-fraction", "0.5")
    distill = ("distill", "--model", model, "--prompts", data, "--output", "OUT/out/answers.jsonl")
    distill = (*distill, "--max-new-tokens", "8", "--batch-size", "4", "--max-repetition", "1")
    cache = ("cache/*", "cache/.*.tmp", "cache/done.bin", "cache/cache.json", "cache/hidden_states.bin")
    record = "answers.provenance.json"
    return {
        command.name: command
        for command in (
            training(
                "train, full heads",
                (*train, "--train-heads", "full", "--aux-token-fraction", "0.5", *evaluated),
                TRAINED_HEADS_NAME,
                watched=TRAINED,
            ),
            training("train, heads with LoRA", (*train, "--train-heads", "lora"), TRAINED_HEADS_NAME, watched=TRAINED),
            training(
                "train, PiSSA",
                (*train, "--init-lora-weights", "pissa", "--r", "4"),
                watched=("out/checkpoints/initial_adapter/*", "out/checkpoints/initial_adapter/adapter_config.json"),
            ),
            training(
                "train, whole model",
                (
                    *(word for word in train if word not in ("--lora-dropout", "0.1")),
                    "--method",
                    "caft_full",
                    *evaluated,
                ),
            ),
            training(
                "train, evaluated each epoch", (*train, *evaluated[:4], "--eval_strategy", "epoch", "--max-rows", "12")
            ),
            training("train, best model", (*train, *evaluated[:-1], "1", "--load_best_model_at_end", "true")),
            training("train-heads", stage_1),
            training("train-heads, cache", (*stage_1, "--cache", "OUT/cache"), watched=cache),
            training(
                "train-heads, early stopping",
                (*stage_1, "--early-stopping-patience", "9"),
            ),
            answering("distill", distill, "answers.jsonl", record, "Distilling"),
            answering(
                "evaluate",
                (
                    *("evaluate", "--task", TOY, "--data", str(folder / "task" / "test.jsonl"), "--model", model),
                    *(
                        "--adapter",
                        str(folder / "adapter"),
                        "--output",
                        "OUT/out",
                        "--batch-size",
                        "2",
                        "--temperature",
                        "1",
                    ),
                ),
                *("rows.jsonl", "evaluation.json", "Evaluating"),
            ),
            Killed(
                "compare",
                ("compare", str(folder / "plan.yaml"), "--output", "OUT/out"),
                lambda out: sum(
                    steps_in(run) for run in (*out.glob("out/runs/*/*/*/adapter"), *out.glob("out/heads/*"))
                ),
                lambda output: STEPS_OF_PLAN - steps_printed(output),
                phase_of_comparison,
                (
                    *(
                        "out/data/*",
                        "out/data/.*",
                        "out/run.json",
                        "out/.*.tmp",
                        "out/choice.json",
                        "out/runs/*/*/*/.*",
                    ),
                    *("out/heads/*/checkpoints/*", "out/heads/*/summary.json", "out/runs/*/*/*/adapter/checkpoints/*"),
                    *("out/runs/*/*/*/adapter/summary.json", "out/runs/*/*/*/*/.rows*", "out/runs/*/*/*/*/rows.jsonl"),
                    *("out/runs/*/*/*/test", "out/comparison.md", "out/comparison.png", "out/summary.json"),
                ),
            ),
            training("train, two processes", (*train, *evaluated), "rng_state_0.pth", "rng_state_1.pth", processes=2),
            training(
                "train-heads, cache, two processes",
                (*stage_1, "--cache", "OUT/cache"),
                *("rng_state_0.pth", "rng_state_1.pth"),
                watched=cache,
                processes=2,
            ),
            answering("distill, two processes", distill, "answers.jsonl", record, "Distilling", processes=2),
        )
    }


NAMES = (
    *("train, full heads", "train, heads with LoRA", "train, PiSSA", "train, whole model"),
    *("train, evaluated each epoch", "train, best model"),
    *("train-heads", "train-heads, cache", "train-heads, early stopping", "distill", "evaluate", "compare"),
    *("train, two processes", "train-heads, cache, two processes", "distill, two processes"),
)


@pytest.mark.slow
@pytest.mark.timeout(max(600, 120 * COUNT))  # seconds
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments_and_run_again_ends_as_the_unbroken_run(name, commands, tmp_path):
    unbroken = Unbroken.of(commands[name], tmp_path / "unbroken")
    for number in range(FIRST, FIRST + COUNT):
        print(require_survives(commands[name], tmp_path / f"killed-{number}", unbroken, str(number)))
