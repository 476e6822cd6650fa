"""What a program in the sandbox cannot do."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from peft_caft.evaluation.sandbox import OUTPUT_LIMIT, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs the limits of POSIX")
filtered = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the system call filter of Linux")


def test_program_that_runs_to_its_end_passes():
    outcome = run_program("import math\nassert math.gcd(12, 18) == 6\nprint('done')")
    assert outcome.passed
    assert (outcome.reason, outcome.output) == ("passed", "done\n")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import sys\nsys.exit(0)", ""),
        ("import os\nos._exit(0)", ""),
        ("raise SystemExit", ""),
        ("import os\nos.abort()", ""),
        ("print('\\ud800')", "UnicodeEncodeError"),
        ("x = '\ud800'", "UnicodeEncodeError"),  # no text in any encoding
    ],
)
def test_program_that_fails_or_ends_itself_does_not_pass(program, said):
    outcome = run_program(program)
    assert not outcome.passed
    assert outcome.reason == "failed"
    assert said in outcome.output or "\ud800" in program


def test_endless_loop_meets_the_processor_limit_and_sleep_the_wall_limit():
    assert run_program("while True: pass", cpu_seconds=1).reason == "timeout"
    started = time.monotonic()
    assert run_program("import time\ntime.sleep(60)", wall_seconds=0.5).reason == "timeout"
    assert time.monotonic() - started < 30


def test_limits_cannot_be_raised():
    program = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert run_program(program).passed is False


@pytest.mark.parametrize("program", ["x = bytearray(10**10)", "x = []\nwhile True: x.append('a' * 10**6)"])
def test_memory_is_limited(program):
    assert run_program(program, memory_mib=256).reason == "memory"


def test_flood_of_output_stops_at_the_limit():
    outcome = run_program("while True: print('x' * 1000)")
    assert outcome.reason == "output"
    assert len(outcome.output) <= OUTPUT_LIMIT


def test_fork_bomb_does_not_start():
    program = "import os\ncount = 0\ntry:\n    while True:\n        os.fork()\n        count += 1\nexcept OSError:\n    print(count)"
    outcome = run_program(program, cpu_seconds=2, wall_seconds=30)
    assert outcome.output == "0\n"


@filtered
@pytest.mark.parametrize(
    "program",
    [
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.killpg(os.getpgid(os.getppid()), 0)",
        "import socket\nsocket.socket()",
        "open('new', 'w')",
        "import os\nos.open('new', os.O_RDWR | os.O_CREAT)",
        "import os\nos.mkdir('new')",
        "import os\nos.symlink('a', 'b')",
    ],
)
def test_processes_signals_sockets_and_new_files_are_denied(program):
    outcome = run_program(program)
    assert outcome.reason == "failed"
    assert "PermissionError" in outcome.output


@filtered
@pytest.mark.parametrize(
    "deed",
    [
        "os.unlink({0!r})",
        "os.rename({0!r}, 'x')",
        "os.truncate({0!r}, 0)",
        "os.chmod({0!r}, 0)",
        "open({0!r}, 'a')",
        "open({0!r}, 'r+')",
    ],
)
def test_files_outside_stay_as_they_are(deed, tmp_path):
    (tmp_path / "file").write_text("contents")
    outcome = run_program("import os\n" + deed.format(str(tmp_path / "file")))
    assert "PermissionError" in outcome.output
    assert (tmp_path / "file").read_text() == "contents"
    assert (tmp_path / "file").stat().st_mode & 0o600 == 0o600


@filtered
def test_no_program_reaches_a_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            "PermissionError" in run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))").output
        )


def test_threads_and_imports_work():
    """Code that is right is not to fail because of the sandbox."""
    program = (
        "import collections, datetime, functools, hashlib, heapq, itertools, json, random, re, statistics, string, typing\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "assert list(ThreadPoolExecutor(4).map(abs, [-1, 2])) == [1, 2]\n"
        "assert __name__ == '__main__'\n"
        "class A: pass\n"
        "assert A.__module__ == '__main__'\n"
    )
    outcome = run_program(program)
    assert outcome.passed, outcome.output


def test_program_sees_no_secret_of_the_environment_and_an_empty_folder(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run_program("import os\nprint('HF_TOKEN' in os.environ, os.listdir('.'))")
    assert outcome.output == "False []\n"


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    run_program("1 / 0")
    run_program("import time\ntime.sleep(60)", wall_seconds=0.2)
    assert list(tmp_path.iterdir()) == []
    assert (len(os.listdir("/proc/self/fd")) if open_files else 0) == open_files
