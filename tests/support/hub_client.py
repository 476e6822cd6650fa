"""A process of its own for the Hub's client, since huggingface_hub reads the Hub's address once, when it is imported.

The test sends Python code over a pipe and gets back the value of its last expression, or the error that it raised.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class ClientError(Exception):
    """What the client raised, as ``"TypeName: message"``."""


def client_environment(endpoint: str, home: Path, **extra: str) -> dict[str, str]:
    """Environment of a process that knows no other Hub, cache or token than the test's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)} | extra


class Client:
    """A running client process; use as a context manager."""

    def __init__(self, environment: dict[str, str], first: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.run(first)

    def run(self, code: str, **values: Any) -> Any:
        """Run code, with ``values`` (JSON) as variables.

        Raises:
            ClientError: if it raised.
        """
        print(json.dumps([code, values]), file=self.process.stdin, flush=True)
        kind, result = json.loads(self.process.stdout.readline())
        if kind == "error":
            raise ClientError(result)
        return result

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code prints must not mix with the answers
    variables: dict[str, Any] = {}
    gc.disable()  # while the first code imports
    for line in sys.stdin:
        code, values = json.loads(line)
        variables |= values
        tree = ast.parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        try:
            exec(compile(tree, "<step>", "exec"), variables)
            result = eval(compile(ast.Expression(last.value), "<step>", "eval"), variables) if last else None
            answer = ["value", result]
        except Exception as error:
            answer = ["error", f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), file=answers, flush=True)
        gc.freeze()  # else every collection walks through what the first code imported
        gc.enable()


if __name__ == "__main__":
    serve()
