"""In a training step the host waits for the device once more than with LoRA: to learn how many rows have a target.

Counted on a CPU, by the operations that would wait for a GPU. ``tests/method/test_on_gpu.py`` lets CUDA count them.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_caft import CAFTConfig
from peft_caft.heads.auxiliary_heads import AuxiliaryHeads
from peft_caft.training.head_trainer import HeadPretraining

from ..support.tiny_models import tiny_model, tokens

WAITING = {
    *("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}


class Operations(TorchDispatchMode):
    """Counts operations whose result the host must see before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts what becomes no such operation on a CPU: reading a tensor as a list, and sending numbers to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy") or (name in ("tensor", "as_tensor") and not isinstance(args[0], torch.Tensor)):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def waits(model, batch) -> Counter[str]:
    """What waits in the third step; the first ones verify the model."""
    for _ in range(2):
        model(**batch)["loss"].backward()
    with Operations() as operations, Calls() as calls:
        model(**batch)["loss"].backward()
    return operations.found + calls.found


@pytest.fixture(scope="module")
def batch():
    ids = tokens()
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_a_step_waits_once_more_than_that_of_lora(head_type, fraction, batch):
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = get_peft_model(tiny_model("llama", attention="sdpa"), LoraConfig(**shared)).train()
    config = CAFTConfig(head_type=head_type, aux_token_fraction=fraction, aux_loss_schedule="constant", **shared)
    caft = get_peft_model(tiny_model("llama", attention="sdpa"), config).train()
    assert waits(caft, batch) - waits(lora, batch) == Counter(tolist=1)


@pytest.mark.parametrize(("targets", "expected"), [("hard", {"tolist": 1}), ("soft", {"tolist": 2, "_unique2": 1})])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_a_step_of_stage_1_waits_a_counted_few_times(head_type, targets, expected, batch):
    model = tiny_model("llama", attention="sdpa")
    pretraining = HeadPretraining(model, AuxiliaryHeads.from_base_model(model, 3, head_type), 0.8, targets).train()
    with torch.no_grad(), Operations() as of_base:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert waits(pretraining, batch) - of_base.found == Counter(expected)
