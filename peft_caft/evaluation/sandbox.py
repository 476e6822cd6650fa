"""Runs a program that a model wrote, with limits on what it can do by accident.

The program runs in its own Python process, with an empty working folder, a bare environment, no
standard input, and limits on processor time, wall time, memory, output size and open files. On
Linux (x86-64, arm64) the system call filter of `seccomp` also keeps it from starting processes,
sending signals, opening sockets, and changing other files than its output.

What this does not protect against: the program can *read* every file that you can read, and a fault
of the kernel or of Python may let it out. Where the system call filter is missing (macOS, other
processors) it can also write and delete your files and use the network. A limit keeps it from
starting processes there, but that limit does not bind root, and a process that leaves the group
survives. Run programs of a model that you do not trust in a container or a virtual machine.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

OUTPUT_LIMIT = 2**16  # bytes
_FILTER = Path(__file__).with_name("seccomp.py")
# This runs in the program's process, first the limits, then the program. A program that ends itself
# (sys.exit(0) before its tests) never writes the word.
_BOOT = """
import os, resource, sys
source, word, report, cpu, memory, output, package = sys.argv[1:8]
def limit(what, value):
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CPU, int(cpu))
try:
    limit(resource.RLIMIT_AS, int(memory))
except (ValueError, OSError):  # macOS has no such limit
    pass
limit(resource.RLIMIT_FSIZE, int(output))
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NOFILE, 64)
with open(source, encoding="utf-8") as file:
    program = file.read()
namespace = {}
with open(package, encoding="utf-8") as file:
    exec(compile(file.read(), "seccomp", "exec"), namespace)
if not namespace["restrict"]():
    limit(resource.RLIMIT_NPROC, 0)
sys.argv = ["program"]
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
os.write(int(report), word.encode())
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end without an exception and without ending itself.
        reason: ``"passed"``, ``"failed"``, ``"timeout"``, ``"memory"`` or ``"output"``.
        output: the last 2,000 characters that it wrote.
    """

    passed: bool
    reason: str
    output: str


def run_program(program: str, cpu_seconds: int = 5, wall_seconds: float = 20.0, memory_mib: int = 1024) -> Outcome:
    """Run a Python program with limits. The module's docstring says what they protect against.

    Args:
        cpu_seconds: limit of processor time.
        wall_seconds: time until it is killed; above ``cpu_seconds``, as the machine may be busy.
        memory_mib: limit of the address space, MiB.

    Raises:
        OSError: if the system has no such limits (Windows).
    """
    if os.name != "posix":
        raise OSError(f"sandbox: got the system {os.name!r}, expected POSIX. Run it in Linux, a container or WSL.")
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="peft-caft-sandbox-") as scratch:
        source, output_path = Path(scratch, "program.txt"), Path(scratch, "output")
        source.write_bytes(program.encode("utf-8", "surrogatepass"))
        (work := Path(scratch, "work")).mkdir()
        reader, writer = os.pipe()
        try:
            with open(output_path, "wb") as output:
                arguments = [source, word, writer, cpu_seconds, memory_mib * 2**20, OUTPUT_LIMIT, _FILTER]
                process = subprocess.Popen(
                    [sys.executable, "-I", "-B", "-c", _BOOT, *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=work,
                    env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=[writer],
                    start_new_session=True,
                )
            os.close(writer)
            writer = -1
            timed_out = False
            try:
                process.wait(wall_seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(reader, False)
            try:
                said = os.read(reader, len(word) + 1).decode(errors="replace")
            except BlockingIOError:  # a process that left the group still holds the pipe
                said = ""
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        size = output_path.stat().st_size
        text = output_path.read_text(encoding="utf-8", errors="replace")[-2000:]
    passed = not timed_out and process.returncode == 0 and said == word
    return Outcome(passed, "passed" if passed else _reason(process.returncode, timed_out, size, text), text)


def _reason(code: int, timed_out: bool, size: int, text: str) -> str:
    last = text.strip().rpartition("\n")[2]
    if timed_out or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    if last.startswith("MemoryError"):
        return "memory"
    if size >= OUTPUT_LIMIT:
        return "output"
    return "failed"
