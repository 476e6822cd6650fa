"""Commands run on the device that accelerate chooses."""

from __future__ import annotations

import pytest
import torch

from peft_caft.training.arguments import trainer_arguments
from peft_caft.training.distillation import distill
from peft_caft.training.loading import load_for_inference
from peft_caft.training.settings import DistillationSettings

from ..support.accelerators import no_state, pretend  # noqa: F401 (a fixture)
from ..support.tiny_checkpoint import save_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.usefixtures("no_state")
@pytest.mark.parametrize("use_cpu", [False, True])
def test_a_model_is_put_on_the_chosen_device(use_cpu, model, monkeypatch):
    pretend(monkeypatch, "meta")  # takes tensors, as an accelerator does
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(use_cpu))
    loaded = load_for_inference(model, "float32", tiny_tokenizer())
    assert loaded.device.type == ("cpu" if use_cpu else "meta")


@pytest.mark.usefixtures("no_state")
def test_distill_leaves_an_accelerator_alone_where_accelerate_is_told_so(model, tmp_path, monkeypatch):
    pretend(monkeypatch, "meta")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ethanol"}\n', encoding="utf-8")
    settings = DistillationSettings(
        model, str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers.jsonl"), max_new_tokens=4
    )
    assert distill(settings)["counts"]["answers"] == 1


@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("xpu", True), ("mps", False), (None, False)])
def test_memory_is_pinned_where_the_device_can_use_it(kind, pinned, tmp_path, monkeypatch):
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
    assert trainer_arguments(str(tmp_path), {}).dataloader_pin_memory == pinned
    assert trainer_arguments(str(tmp_path), {}, options=["--dataloader_pin_memory", "true"]).dataloader_pin_memory
