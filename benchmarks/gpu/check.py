"""Job `check`: the tests marked ``gpu``, each with its outcome and its time."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from xml.etree import ElementTree

import pytest

from peft_caft.basics.tables import markdown_table

from .measuring import Job

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    job = Job.begin("check", __doc__)
    report = job.out / "check.xml"
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_on_gpu.py"))
    os.environ |= {"PEFT_CAFT_GPU_TESTS_ON": "cpu"} if job.smoke else {}
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--junitxml={report}"]
    with open(job.out / "check.log", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        code = pytest.main([*options, *files])
    if not report.is_file():
        print((job.out / "check.log").read_text()[-4000:])
        return code
    for test in ElementTree.parse(report).iter("testcase"):
        failure = next((child for child in test if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if failure is None else failure.tag
        why = "" if failure is None else next(iter((failure.get("message") or "").splitlines()), "")[:200]
        job.write(kind="test", test=test.get("name"), outcome=outcome, why=why, seconds=float(test.get("time") or 0))
    job.report(table(job.records()))
    return code


def table(found: list[dict]) -> str:
    """Outcomes by number, and every test that did not pass with its reason."""
    tests = [record for record in found if record["kind"] == "test"]
    numbers = ", ".join(f"{count} {outcome}" for outcome, count in Counter(t["outcome"] for t in tests).items())
    rows = [[t["outcome"], t["test"], t["why"].replace("|", "/")] for t in tests if t["outcome"] != "passed"]
    others = markdown_table(["outcome", "test", "reason"], rows) if rows else ""
    return f"{found[0]['card']}: {numbers}\n\n{others}"


if __name__ == "__main__":
    sys.exit(main())
