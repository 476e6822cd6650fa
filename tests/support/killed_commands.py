"""Commands killed with SIGKILL, all their processes at once, and run again to the end: what must hold afterwards.

The result is that of the unbroken run: the same files with the same contents, but for times, memory and versions. A run goes on
from what it had finished, what it had finished stays as it was, and where a result may be read it is whole.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
from safetensors.numpy import load_file

from .forked_command import SERVER, launched, run_command

# Names of values that differ from run to run: times, memory, what was installed, and hashes of files that hold them. Trainer's means
# over a run are left out of a resumed run's log.
VARIES = re.compile(
    r".*seconds.*|.*_runtime|.*_per_second(_per_process)?|peak_memory_mib|versions|git_commit|begun_with|git_commits_of_runs|command|"
    r"heads_files_sha256|train_loss"
)
FINISHED = "holds a finished run"


@dataclass(frozen=True)
class Killed:
    """A command to be killed.

    Attributes:
        arguments: those after ``peft-caft``, with ``OUT`` in place of the folder of the output.
        done: how much a folder says that a run in it has finished, in ``unit``.
        begun_at: how much had been finished when a run began, by its output; None if that does not say.
        phase: what a run had come to, by its folder.
        watched: files at whose appearance the command is killed, relative to the folder; ``N`` is a random number up to 9.
        processes: of ``accelerate launch``.
        again: the exit status when it is run once more after its end.
    """

    name: str
    arguments: tuple[str, ...]
    done: Callable[[Path], int]
    begun_at: Callable[[str], int | None]
    phase: Callable[[Path], str]
    watched: tuple[str, ...]
    processes: int = 1
    again: int = 0

    def start(self, folder: Path) -> list[multiprocessing.Process]:
        arguments = ["peft-caft", *(word.replace("OUT", str(folder)) for word in self.arguments)]
        environment = launched("ddp.yaml") if self.processes > 1 else {}
        started = []
        for rank in range(self.processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.processes > 1 else {}
            log = str(folder.with_name(f"{folder.name}.log{rank}"))
            started.append(SERVER.Process(target=in_own_group, args=(arguments, log, environment | own)))
            started[-1].start()
        return started

    def finish(self, folder: Path) -> tuple[int, str, float]:
        """Exit status, output and seconds of a run to the end."""
        begun = time.perf_counter()
        processes = self.start(folder)
        for process in processes:
            process.join(240)
        kill(processes)
        output = "".join(folder.with_name(f"{folder.name}.log{rank}").read_text() for rank in range(self.processes))
        return max(abs(process.exitcode or 0) for process in processes), output, time.perf_counter() - begun


def in_own_group(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)  # so that whatever it starts can be killed with it
    run_command(arguments, log, environment)


def kill(processes: list[multiprocessing.Process]) -> bool:
    """Kill groups of processes; whether all were alive."""
    alive = [process.is_alive() for process in processes]
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # in case that it has no group yet
        process.join()
    return all(alive)


@dataclass(frozen=True)
class Moment:
    """When to kill: after a share of the unbroken run's seconds, or a delay after a file appears."""

    share: float | None = None
    pattern: str | None = None
    delay: float = 0.0

    @classmethod
    def drawn(cls, command: Killed, randomness: random.Random) -> Moment:
        if randomness.random() < 0.5:
            return cls(share=randomness.random())
        pattern = randomness.choice(command.watched).replace("N", str(randomness.randint(1, 9)))
        return cls(pattern=pattern, delay=randomness.choice((0, 0, 0.01 * randomness.random())))

    def wait(self, folder: Path, seconds: float, processes: list[multiprocessing.Process]) -> None:
        if self.share is not None:
            processes[0].join(self.share * seconds)
            return
        before = set(folder.glob(str(self.pattern)))
        while all(process.is_alive() for process in processes) and before.issuperset(folder.glob(str(self.pattern))):
            time.sleep(0.0002)
        time.sleep(self.delay)


@dataclass(frozen=True)
class Unbroken:
    """A run that was not killed."""

    contents: dict[str, Any]
    seconds: float

    @classmethod
    def of(cls, command: Killed, folder: Path) -> Unbroken:
        folder.mkdir()
        status, output, _ = command.finish(folder)
        assert status == 0, output
        again = command.again, FINISHED if command.again else ""
        status, output, _ = command.finish(folder)
        assert (status, again[1] in output) == (again[0], True), output
        other = folder.with_name(f"{folder.name}-timed")
        other.mkdir()
        _, _, seconds = command.finish(other)
        found = contents(folder)
        assert not (wrong := differences(contents(other), found)), wrong
        return cls(found, seconds)


def require_survives(command: Killed, folder: Path, unbroken: Unbroken, seed: str) -> dict[str, Any]:
    """Kill a run once or twice, and require of the last run what the module's docstring says.

    Returns:
        the moments and phases of the kills.
    """
    randomness = random.Random(f"{command.name} {seed}")
    folder.mkdir()
    kills = []
    for _ in range(randomness.choice((1, 1, 2))):
        moment = Moment.drawn(command, randomness)
        processes = command.start(folder)
        moment.wait(folder, unbroken.seconds, processes)
        was_alive = kill(processes)
        kills.append({"moment": moment, "phase": command.phase(folder) if was_alive else "after the end"})
        require_whole(folder)
    done, kept = command.done(folder), times_of_results(folder)
    status, output, _ = command.finish(folder)
    assert "Traceback" not in output or command.processes > 1, output  # torch's, where one process leaves the others
    wrong = differences(contents(folder), unbroken.contents)
    wrong += [f"{name}: written again" for name, at in kept.items() if times_of_results(folder).get(name) != at]
    if status:
        wrong += [] if status == command.again and FINISHED in output else [f"exit status {status}"]
    elif (begun := command.begun_at(output)) not in (None, done):
        wrong.append(f"begun at {begun}, expected {done}")
    assert not wrong, "\n".join([str(kills), *wrong, output])
    return {"command": command.name, "seed": seed, "kills": kills, "done": done}


def visible(folder: Path) -> list[Path]:
    """Files that a user may take for results, not those of checkpoints and hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(
            part.startswith(".") or part in ("checkpoints", "cache") for part in path.relative_to(folder).parts
        )
    )


def require_whole(folder: Path) -> None:
    """Every file that may be read can be."""
    for path in visible(folder):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            matplotlib.image.imread(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)


def times_of_results(folder: Path) -> dict[str, int]:
    """When the files that end a run, or a part of a comparison, were written."""
    names = ("summary.json", "evaluation.json", "choice.json", "answers.provenance.json", "provenance.json")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in visible(folder) if path.name in names}


def contents(folder: Path) -> dict[str, Any]:
    """Relative path -> contents of every file, hidden ones too, without what varies from run to run."""
    return {str(path.relative_to(folder)): _content(path, folder) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path, folder: Path) -> Any:
    if path.suffix == ".json":
        return _steady(json.loads(path.read_text(encoding="utf-8").replace(str(folder), "OUT")))
    if path.name == "comparison.md":
        return [_without_seconds(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".md":
        return re.sub(r"\d+(\.\d+)?( s\b| min\b| MiB\b)|, \d+ tokens/s", "TIME", path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _without_seconds(line: str) -> str:
    """A line of the table of a comparison, which ends in seconds and tokens."""
    cells = line.split("|")
    return "|".join(cells[:-3]) + cells[-2] if len(cells) > 9 else line


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _steady(own) for name, own in value.items() if not VARIES.fullmatch(name)}
    return [_steady(own) for own in value] if isinstance(value, list) else value


def differences(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of files, or of values in JSON files, that are not the same."""
    found = []
    for name in sorted({*got, *expected}):
        if name not in got or name not in expected:
            found.append(f"{name}: {'left over' if name in got else 'missing'}")
        elif isinstance(got[name], dict) and isinstance(expected[name], dict):
            found += [f"{name}: {one}" for one in differences(got[name], expected[name])]
        elif got[name] != expected[name]:
            shown = f": got {got[name]!r}, expected {expected[name]!r}"
            found.append(f"{name}{shown if len(shown) < 3000 else ''}")
    return found
