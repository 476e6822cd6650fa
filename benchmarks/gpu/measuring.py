"""What the jobs share: their options, the card and its ceilings, times by events, and results that are written as they come."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from peft_caft.basics.provenance import provenance

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One job, which appends its results to ``NAME.jsonl`` in the folder for output.

    Attributes:
        name: name of the job.
        options: its command line.
    """

    name: str
    options: argparse.Namespace

    @classmethod
    def begin(cls, name: str, description: str, **options: Any) -> Job:
        """Read the command line, and write the first record: card, versions, commit and command.

        Args:
            options: further options, NAME=arguments of ``add_argument``.
        """
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, to see that the job runs")
        for option, arguments in options.items():
            parser.add_argument(f"--{option}", **arguments)
        job = cls(name, parser.parse_args())
        if not job.smoke and not torch.cuda.is_available():
            raise SystemExit(f"{name}: found no CUDA device, expected one. Run it with --smoke on a machine without.")
        torch.manual_seed(0)
        gc.freeze()  # later collections need not walk through the imported modules
        job.out.mkdir(parents=True, exist_ok=True)
        job.path.unlink(missing_ok=True)
        origin = provenance()
        origin["git_commit"] = origin["git_commit"] or os.environ.get("COMMIT")  # the tree may travel without .git
        job.write(kind="origin", **origin, **card(job.device, job.smoke))
        return job

    @property
    def smoke(self) -> bool:
        return self.options.smoke

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke else "cuda")

    @cached_property
    def out(self) -> Path:
        return Path(os.environ.get("OUT") or HERE / "out")

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}.jsonl"

    def write(self, **record: Any) -> None:
        """Append a record to the results, on the disk before this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """The results so far; the first is their origin."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def report(self, text: str) -> None:
        """Print the table of the job, and write it beside the results."""
        (self.out / f"{self.name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}", flush=True)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call on the device: between two events on a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def interleaved(
    functions: dict[str, Callable[[], Any]],
    turns: int,
    device: torch.device,
    warm_up: int = 2,
    after_turn: Callable[[dict[str, float]], None] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Seconds of each function in each turn. In a turn all run once, so that a slow spell meets all alike.

    Args:
        functions: what to time; where one has a method ``prepare``, that runs before and is not timed.
        warm_up: number of turns before those that count.
        after_turn: is told the seconds of each turn that counts.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(warm_up + turns):
        taken = {}
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:  # so that none always follows the heaviest
            getattr(functions[name], "prepare", lambda: None)()
            taken[name] = seconds(functions[name], device)
        if turn >= warm_up:
            after_turn(taken)
            for name, value in taken.items():
                found[name].append(value)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors during a call, above what was allocated before it; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def card(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Name and memory of the card, and its two ceilings, measured: bytes and bf16 operations per second."""
    side, length = (256, 2**20) if smoke else (8192, 2**31)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (length,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = interleaved({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, 10, device, warm_up=3)
    name, memory = "CPU", 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return {
        "card": name,
        "memory_bytes": memory,
        "cuda": torch.version.cuda,
        "bytes_per_second": 2 * length / statistics.median(times["copy"]),
        "flops_per_second": 2 * side**3 / statistics.median(times["product"]),
    }
