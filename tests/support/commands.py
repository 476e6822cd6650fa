"""Commands of ``peft-caft`` in this process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from peft_caft.cli.app import main


def peft_caft(*arguments: str, expect: int = 0) -> str:
    """Run a command in this process, as the console script does; its output."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", ["peft-caft", *arguments])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
    assert code == expect, output.getvalue()
    return output.getvalue()
