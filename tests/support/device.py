"""The device of tests marked ``gpu``: a CUDA card, or a CPU where ``benchmarks/gpu/run.sh check --smoke`` says so."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("PEFT_CAFT_GPU_TESTS_ON", "cuda"))
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
