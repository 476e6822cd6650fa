"""The record of a run says which code made it, and by which command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from peft_caft.basics import provenance

from ..support.places import ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert provenance.git_commit.__wrapped__() == head.stdout.strip()


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["{cli}/__main__.py", "train", "--data", "/some/where/data.jsonl"], "peft-caft train --data data.jsonl"),
        (["/usr/bin/peft-caft", "train"], "peft-caft train"),
        (["benchmarks/step.py", "--n", "2"], "python step.py --n 2"),
        (["elsewhere/cli/__main__.py", "x"], "python __main__.py x"),
    ],
)
def test_the_command_is_what_a_reader_can_type(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [word.format(cli=ROOT / "peft_caft" / "cli") for word in argv])
    assert provenance.provenance()["command"] == command


def test_the_record_is_json():
    assert json.loads(json.dumps(provenance.provenance()))["versions"]["peft-caft"]
