"""Commands in several processes, under ``accelerate launch`` on the CPU with gloo, and the same in one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import pytest

from peft_caft.cli.app import main

from .places import EXAMPLES, ROOT

FSDP_ON_CPU = ("-m", "tests.support.fsdp_on_cpu")


def fsdp1_config(folder: Path) -> Path:
    """The example for FSDP2, made one for FSDP1."""
    lines = (
        (EXAMPLES / "accelerate" / "fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1").splitlines()
    )
    lines = [line for line in lines if "reshard_after_forward" not in line]  # another kind of value there
    path = folder / "fsdp1.yaml"
    path.write_text("\n".join([*lines, "  fsdp_sync_module_states: false"]))
    return path


def start(config: str, arguments: list[str], *program: str) -> subprocess.Popen:
    """Two processes, and the one that starts them; the program is ``-m`` and a module, by default the command line, or a script."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "accelerate" / config)]
    return subprocess.Popen(
        [sys.executable, *launcher, "--main_process_port", "0", *(program or ("-m", "peft_caft.cli")), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Both streams of all processes."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def kill_when(moment: Callable[[], bool], process: subprocess.Popen) -> None:
    try:
        while not moment():
            assert process.poll() is None, f"ended before the moment came: {process.communicate()[0]}"
            time.sleep(0.001)
    finally:
        for victim in (*psutil.Process(process.pid).children(recursive=True), process):
            victim.kill()
        process.communicate()


def in_one_process(arguments: list[str]) -> str:
    """The same command in this process; its output."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", ["peft-caft", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code, output.getvalue()
    return output.getvalue()


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
