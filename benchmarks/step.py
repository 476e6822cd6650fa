"""What a training step costs in time and memory: LoRA, CAFT, and the package of CAFT's authors, in one interleaved run.

    make bench

Every arm is a process of its own (`step_worker.py`), which sleeps while others step. In each turn all arms make one step (forward,
backward, optimizer) in an order that is drawn anew, so that a busy machine slows all of them alike; reported are medians, with
quartiles, of the ratios within each turn. Memory is measured before, in other processes, whose allocator gives back what is
freed. Each model's figures are written as soon as they are there; a run that is repeated goes on with the next model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu.measuring import spread
from step_models import GEMMA, LARGE_VOCABULARY, SMOLLM2, folder_of, random_llama, token_ids
from tqdm import tqdm

import peft_caft
from peft_caft.basics.files import write_text
from peft_caft.basics.provenance import provenance

HERE = Path(__file__).parent
AUTHORS_PYTHON = HERE.parent / ".venv-authors" / "bin" / "python"
BASELINE = "LoRA"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"method": "lora"},
    "LoRA in TRL's SFTTrainer": {"method": "trl"},
    "LoRA, supervised rows alone": {"method": "rows"},
    "CAFT, residual": {"method": "caft", "head_type": "residual"},
    "CAFT, residual, p = .25": {"method": "caft", "head_type": "residual", "fraction": 0.25},
    "CAFT, decoder layer": {"method": "caft", "head_type": "decoder_layer"},
    "CAFT, decoder layer, p = .25": {"method": "caft", "head_type": "decoder_layer", "fraction": 0.25},
    "caft-llm, residual": {"method": "caft-llm", "head_type": "residual"},
    "caft-llm, decoder layer": {"method": "caft-llm", "head_type": "decoder_layer"},
}
SWEPT = (BASELINE, "CAFT, residual", "CAFT, decoder layer")
SWEEPS = {  # what is changed, and the values; the rest is as in the main table
    "n": [2, 5, 9],
    "vocabulary": [8_000, 32_000, 128_256],
    "tokens": [128, 256, 512, 1024],
    "s": [0.1, 0.3, 0.5, 0.7, 1.0],
}
# Memory of 64 kB and more comes from the system and goes back to it, so that the resident set is what is in use.
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Worker:
    """The process of one arm."""

    def __init__(self, arm: str, folder: Path, num_heads: int, threads: int, environment: dict[str, str]) -> None:
        python = str(AUTHORS_PYTHON) if ARMS[arm]["method"] == "caft-llm" else sys.executable
        self.arm = arm
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill and stop the process
        self.process = subprocess.Popen(
            [python, str(HERE / "step_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | environment,
        )
        request = {"arm": ARMS[arm], "folder": str(folder), "num_heads": num_heads, "threads": threads, "seed": 0}
        self.loaded = self.ask(command="load", **request)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, and says below why
        if not (answer := self.process.stdout.readline()):
            self.log.seek(0)
            raise RuntimeError(
                f"arm {self.arm!r}: its process ended with code {self.process.wait()}:\n{self.log.read()[-2000:]}"
            )
        return json.loads(answer)

    def step(self, input_ids: list[int], supervised: int) -> dict[str, Any]:
        return self.ask(command="step", input_ids=input_ids, supervised=supervised)


@contextmanager
def workers(arms: list[str], folder: Path, num_heads: int, threads: int, **environment: str) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        running = []
        for arm in tqdm(arms, desc="Loading", unit=" arms", leave=False):
            running.append(Worker(arm, folder, num_heads, threads, environment))
            stack.callback(running[-1].process.kill)
        yield running


def timed(
    running: list[Worker], turns: int, input_ids: list[int], supervised: int, what: str
) -> dict[str, list[float]]:
    """Seconds of every arm's step in every turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {worker.arm: [] for worker in running}
    order = random.Random(0)
    for turn in tqdm(range(turns + 1), desc=what, unit=" turns"):
        for worker in order.sample(running, len(running)):
            answer = worker.step(input_ids, supervised)
            if turn:
                seconds[worker.arm].append(answer["seconds"])
    return seconds


def memory(arms: list[str], folder: Path, num_heads: int, threads: int, ids: list[int], supervised: int) -> dict:
    """Bytes of each arm: added by adapter and heads, and at the peaks of three steps above everything that was loaded."""
    found = {}
    for arm in tqdm(arms, desc="Memory", unit=" arms"):
        with workers([arm], folder, num_heads, threads, **GIVING_BACK) as (worker,):
            worker.step(ids, supervised)  # makes the optimizer's state
            peaks = [worker.step(ids, supervised)["peak_bytes"] for _ in range(3)]
            loaded = worker.loaded
        found[arm] = {
            "added": loaded["loaded_bytes"] - loaded["base_bytes"],
            "step": statistics.median(peaks) - loaded["loaded_bytes"],
            "step_range": [min(peaks) - loaded["loaded_bytes"], max(peaks) - loaded["loaded_bytes"]],
            "head_parameters": loaded["head_parameters"],
            "versions": loaded["versions"],
        }
    return found


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within the turns."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def main(
    models: Annotated[
        list[str] | None,
        typer.Option(help="Models, or folders; again for more. [default: all three]", show_default=False),
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option(help="Arms; again for more. [default: all that can run]", show_default=False)
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns that count, after one that warms up.")] = 11,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of the row.")] = 512,
    supervised: Annotated[
        float, typer.Option(min=0.01, max=1, help="s: share of them, at its end, with a label.")
    ] = 0.5,
    n: Annotated[int, typer.Option(min=2, help="Tokens that CAFT predicts: n - 1 heads.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of each arm.")] = os.cpu_count() or 1,
    sweeps: Annotated[bool, typer.Option(help="Also change n, vocabulary, tokens and s, one at a time.")] = True,
    sweep_turns: Annotated[int, typer.Option(min=1, help="Turns that count, in those.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = HERE / "step",
) -> None:
    """Measure steps; `step_results.py` makes tables and plots of the figures."""
    unknown = [arm for arm in arms or [] if arm not in ARMS]
    if unknown:
        raise typer.BadParameter(f"got {unknown}, expected some of {list(ARMS)}.", param_hint="--arms")
    settings = {"tokens": tokens, "s": supervised, "n": n, "threads": threads}
    for name in models or [SMOLLM2, LARGE_VOCABULARY, GEMMA]:
        try:
            folder = folder_of(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--models") from None
        title = name if not Path(name).is_dir() else Path(name).name
        file = output / f"{title.replace(', ', '-').replace(' ', '-')}.json"
        here = [arm for arm in arms or ARMS if ARMS[arm]["method"] != "caft-llm" or _caft_llm_runs(folder)]
        record = {"model": title, "settings": settings | {"turns": turns, "arms": here}, **origin()}
        if _is_done(file, record):
            print(f"{title}: measured already, in {file.name}")
            continue
        ids, targets = token_ids(folder, tokens), round(supervised * tokens)
        record["memory"] = memory(here, folder, n - 1, threads, ids, targets)
        with workers(here, folder, n - 1, threads) as running:
            record["seconds"] = timed(running, turns, ids, targets, f"Steps, {title}")
        write_text(file, json.dumps(record, indent=2) + "\n")
    if sweeps:
        sweep(output / "sweeps.json", settings | {"turns": sweep_turns}, origin())


def sweep(file: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
    """One setting at a time; the vocabulary on random Llamas, everything else on SmolLM2."""
    record: dict[str, Any] = {"settings": settings, "values": SWEEPS, **origin}
    record["seconds"] = {name: {} for name in SWEEPS}
    if _is_done(file, record):
        record["seconds"] |= json.loads(file.read_text())["seconds"]
    smollm2 = folder_of(SMOLLM2)

    def measure(name: str, values: list, folder: Path, n: int) -> None:
        missing = [value for value in values if str(value) not in record["seconds"][name]]
        if not missing:
            print(f"sweep of {name}, {values}: measured already, in {file.name}")
            return
        with workers(list(SWEPT), folder, n - 1, settings["threads"]) as running:
            for value in missing:
                chosen = settings | {name: value}
                ids = token_ids(folder, chosen["tokens"])
                targets = round(chosen["s"] * chosen["tokens"])
                what = f"Steps, {name} = {value:g}"
                record["seconds"][name][str(value)] = timed(running, settings["turns"], ids, targets, what)
                write_text(file, json.dumps(record, indent=2) + "\n")

    measure("tokens", SWEEPS["tokens"], smollm2, settings["n"])
    measure("s", SWEEPS["s"], smollm2, settings["n"])
    for n in SWEEPS["n"]:
        measure("n", [n], smollm2, n)
    for vocabulary in SWEEPS["vocabulary"]:
        measure("vocabulary", [vocabulary], random_llama(vocabulary), settings["n"])


def _caft_llm_runs(folder: Path) -> bool:
    """Whether its environment is there (``make bench`` makes it) and the model is a Llama, the only kind that it knows."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return AUTHORS_PYTHON.exists() and kind == "llama"


def origin() -> dict[str, Any]:
    """`provenance`, and a digest of what a step runs: the rooms that hold the public names, and the worker.

    The version stays the same from one commit to the next, and a commit may change nothing that a step runs.
    """
    package = Path(peft_caft.__file__).parent
    files = [HERE / "step_worker.py"]
    files += sorted(path for room in ("basics", "heads", "method") for path in (package / room).glob("*.py"))
    return {**provenance(), "code_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()}


def _is_done(file: Path, record: dict[str, Any]) -> bool:
    """Whether the file holds figures of the same settings, versions, machine and code."""
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    return all(found.get(key) == record[key] for key in ("settings", "versions", "machine", "code_sha256"))


if __name__ == "__main__":
    typer.run(main)
