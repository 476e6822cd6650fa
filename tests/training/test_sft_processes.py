"""TRL's SFTTrainer in two processes under `accelerate launch`, on the CPU with gloo: what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..support.places import EXAMPLES, ROOT
from ..support.processes import FSDP_ON_CPU, finish, start
from ..support.tiny_checkpoint import save_checkpoint, write_chats

pytestmark = pytest.mark.slow
SCRIPT = str(EXAMPLES / "train_with_sft_trainer.py")
# Not Adam, which divides by gradients: where they are almost 0, what is left of them depends on the order of sums.
OPTIONS = [
    *("--max_steps", "4", "--logging_steps", "1", "--save_steps", "2", "--optim", "sgd", "--learning_rate", "1"),
    *("--aux_loss_weight", "0.5", "--r", "320", "--max_grad_norm", "1e9", "--bf16", "false"),
    *("--report_to", "none", "--use_cpu", "true", "--per_device_train_batch_size"),
]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="see `make test-optional`")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    large = {"hidden_size": 320, "vocab_size": 320, "intermediate_size": 320, "num_key_value_heads": 4}
    base = save_checkpoint(folder / "model", initializer_range=0.03, **large)
    return ["--model", base, "--data", write_chats(folder / "data.jsonl", 60)]


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    arguments = [*files, "--output_dir", str(output), *OPTIONS, "8"]
    finished = subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return output


def logged(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    ("config", "program"),
    [
        ("ddp.yaml", ()),
        ("fsdp2.yaml", FSDP_ON_CPU),
        pytest.param("zero2.yaml", (), marks=needs_deepspeed),
        pytest.param("zero3.yaml", (), marks=needs_deepspeed),
    ],
)
def test_two_processes_train_as_one_does(config, program, files, one_process, tmp_path):
    finish(start(config, [*files, "--output_dir", str(tmp_path), *OPTIONS, "4"], *program, SCRIPT))
    for own, other in zip(logged(tmp_path), logged(one_process), strict=True):
        for name in ("loss", "grad_norm", "caft/gamma"):
            assert own[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, one_process))
    assert weights.keys() == expected.keys()
    assert any(weight.abs().max() > 1e-4 for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
