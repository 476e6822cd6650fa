"""The record of how an artifact was made: command, versions, commit, machine."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("peft-caft", "torch", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which results depend."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


def listed(versions: dict[str, str]) -> str:
    """The `versions` as one line of text."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def source_name(source: str) -> str:
    """A model's or artifact's Hub id, or the name of its folder: a path means nothing elsewhere."""
    return Path(os.path.abspath(source)).name if Path(source).is_dir() else source


@functools.cache
def git_commit() -> str | None:
    """Commit of the source tree that this package runs from; None in an installed wheel.

    Cached at the first call, so that a long run records the code it started with.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def provenance() -> dict[str, object]:
    """Command, versions, commit and machine of this process, for the record of an artifact."""
    # A path means nothing on another machine, so only its last part is recorded.
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    program = Path(sys.argv[0])
    is_script = program.suffix == ".py" and program.resolve().parent != Path(__file__).resolve().parents[1] / "cli"
    started = ["python", program.name] if is_script else ["peft-caft"]
    return {
        "command": shlex.join([*started, *arguments]),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
    }


def machine() -> str:
    """System, cores and accelerators in words, such as "Linux x86_64, 2 x AMD EPYC"."""
    from .devices import accelerators

    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.is_file() else []
    processor = models[0].partition(":")[2].strip() if models else "cores"
    parts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} x {processor}"]
    return ", ".join([*parts, *filter(None, [accelerators()])])


def weights_digest(model: nn.Module) -> str:
    """Hex digest of all parameters as they lie in memory: 1 GiB takes about a second.

    A share of the values would not do, since an adapter may change a few rows of an embedding.
    """
    import torch

    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def peak_memory_mib() -> float | None:
    """Peak memory of this process in MiB, of the accelerator if it used one; None on Windows."""
    from .devices import peak_bytes

    if peak := peak_bytes():
        return peak / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
