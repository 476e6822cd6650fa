"""``peft-caft`` commands in processes of their own that can be killed, forked from a server that has done the slow imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils.other import get_free_port

from peft_caft.cli.app import main

SERVER = multiprocessing.get_context("forkserver")
COMMANDS = ("training.distillation", "training.head_training", "training.fine_tuning", "evaluation.comparison")
SERVER.set_forkserver_preload([*(f"peft_caft.{name}" for name in COMMANDS), __name__])


def run_command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """What the console script does, with its output in ``log``."""
    gc.freeze()  # else every collection walks through what the server imported
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = arguments
    main()


def start(arguments: list[str], log: Path, **environment: str) -> multiprocessing.Process:
    process = SERVER.Process(target=run_command, args=(arguments, str(log), environment))
    process.start()
    return process


def finish(arguments: list[str], log: Path, expect: int = 0) -> str:
    """Run to the end; the output."""
    return output_of(start(arguments, log), log, expect)


def output_of(process: multiprocessing.Process, log: Path, expect: int = 0) -> str:
    process.join(120)
    output = log.read_text()
    assert process.exitcode == expect, output
    return output


def in_two_processes(arguments: list[str], folder: Path) -> list[str]:
    """The outputs of two processes with the environment that ``accelerate launch --config_file ddp.yaml`` makes for them."""
    port, logs = str(get_free_port()), [folder / "rank0.log", folder / "rank1.log"]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    processes = [start(arguments, log, RANK=str(i), LOCAL_RANK=str(i), **together) for i, log in enumerate(logs)]
    return [output_of(process, log) for process, log in zip(processes, logs, strict=True)]


def kill_when(moment: Callable[[], bool], arguments: list[str], log: Path) -> None:
    """Run until ``moment`` comes, and kill at once."""
    process = start(arguments, log)
    try:
        while not moment():
            assert process.is_alive(), f"ended before the moment came: {log.read_text()}"
            time.sleep(0.0002)
    finally:
        process.kill()
        process.join()
