"""The benchmark of a training step, on a tiny model, with real processes for its arms."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaForCausalLM

from ..support.places import ROOT
from ..support.tiny_models import CONFIGS

BENCHMARKS = ROOT / "benchmarks"
ARMS = ["LoRA", "CAFT, residual", "CAFT, decoder layer, p = .25"]


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_figures_of_every_arm_are_written_once_and_become_a_report(tmp_path):
    LlamaForCausalLM(CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    options = ["--models", str(tmp_path / "model"), "--turns", "3", "--tokens", "64", "--no-sweeps"]
    options += [part for arm in ARMS for part in ("--arms", arm)]
    first = run("step.py", *options, "--output", str(tmp_path / "figures"))
    assert first.returncode == 0, first.stderr[-2000:]
    record = json.loads((tmp_path / "figures" / "model.json").read_text())
    assert list(record["seconds"]) == list(record["memory"]) == ARMS
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in record["seconds"].values())
    assert record["memory"]["LoRA"]["head_parameters"] == 0
    assert record["memory"]["CAFT, residual"]["head_parameters"] == 4 * 32 * 32
    assert all(arm["step"] > 0 for arm in record["memory"].values())
    again = run("step.py", *options, "--output", str(tmp_path / "figures"))
    assert "measured already" in again.stdout
    report = run("step_results.py", "--figures", str(tmp_path / "figures"), "--output", str(tmp_path / "RESULTS.md"))
    assert report.returncode == 0, report.stderr[-2000:]
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"| {arm} " in text for arm in ARMS)
    assert str(tmp_path) not in text
    assert (tmp_path / "figures" / "models.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [(["--arms", "LoRa"], "expected some of"), (["--models", "Llama-9"], "expected a folder or one of")],
)
def test_unknown_names_are_refused(options, said, tmp_path):
    result = run("step.py", *options, "--output", str(tmp_path))
    assert result.returncode == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
