"""``peft-caft`` commands in processes of their own that can be killed, forked from a server that has done the slow imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from .places import EXAMPLES

SERVER = multiprocessing.get_context("forkserver")
COMMANDS = ("cli", "training.distillation", "training.head_training", "training.fine_tuning", "evaluation.comparison")
LATE = ("heads.plots", "evaluation.comparison_plots")  # what commands import when they need it
SERVER.set_forkserver_preload(
    [
        f"{__package__}.fork_server",
        *(f"peft_caft.{name}" for name in (*COMMANDS, *LATE)),
        *("transformers.models.llama.modeling_llama", "typer._adapters", "pytest", __name__),
    ]
)


def run_command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """What ``python -m peft_caft.cli`` does, with its output in ``log``."""
    gc.freeze()  # else every collection walks through what the server imported
    gc.enable()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = arguments
    runpy.run_module("peft_caft.cli", run_name="__main__", alter_sys=True)


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


def launched(config: str) -> dict[str, str]:
    """The environment that ``accelerate launch --config_file CONFIG`` makes for all of its processes."""
    options = ["--config_file", str(EXAMPLES / "accelerate" / config), "--main_process_port", "0", "a program"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    environment = prepare_multi_gpu_env(arguments)
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": arguments.master_port,
        "WORLD_SIZE": arguments.nproc_per_node,
    }
    return environment | together


def in_two_processes(config: str, arguments: list[str], folder: Path) -> list[str]:
    """The outputs of two processes as ``accelerate launch --config_file CONFIG -m peft_caft.cli`` starts them."""
    environment, logs = launched(config), [folder / "rank0.log", folder / "rank1.log"]
    assert environment["WORLD_SIZE"] == "2"
    processes = [start(arguments, log, RANK=str(i), LOCAL_RANK=str(i), **environment) for i, log in enumerate(logs)]
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
