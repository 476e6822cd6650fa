"""One way to make a training step, in a process of its own: it loads a model and steps it when `step.py` says so.

Requests and answers are JSON, one a line, on standard input and output; between requests the process sleeps:

    {"command": "load", "arm": {"method": "lora"}, "folder": ..., "num_heads": 4, "threads": 2, "seed": 0}
        -> {"base_bytes": ..., "loaded_bytes": ..., "adapter_parameters": ..., "head_parameters": ..., "versions": {...}}
    {"command": "step", "input_ids": [...], "supervised": 256}
        -> {"seconds": ..., "loss": ..., "peak_bytes": ..., "resting_bytes": ...}

The same file runs in two environments: this package's, and that of the authors' caft-llm, which needs transformers 4.51.
So everything beyond the standard library is imported where an arm needs it. ``--versions`` prints what is installed.

Memory is the process's resident set, by /proc: its size, and its peak since /proc/self/clear_refs was last written.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("peft-caft", "caft-llm", "torch", "transformers", "peft", "accelerate", "trl")
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
LEARNING_RATE = 1e-5  # small: the steps go on for a while, and only their cost is of interest
AUX_LOSS_WEIGHT, AUX_LOSS_DECAY = 0.01, 0.8
# What caft-llm's scripts/train.py adapts: all linear maps of a Llama's layers, which is "all-linear" without its heads.
LLAMA_LINEAR = ["o_proj", "v_proj", "k_proj", "down_proj", "gate_proj", "q_proj", "up_proj"]
# Imported before anything is measured, so that code does not count as memory of an adapter.
IMPORTS = {
    "lora": ["peft"],
    "trl": ["peft", "trl.trainer.sft_trainer"],
    "rows": ["peft", "peft_caft", "peft_caft.method.linear_cross_entropy"],
    "caft": ["peft_caft"],
    "caft-llm": ["peft", "caft", "transformers.trainer"],
}


# The arms: each makes the model that trains, and a function from a batch to its loss.


def lora(base: Any, request: dict) -> tuple:
    """PEFT's LoRA and the loss of transformers, which computes the logits of all tokens."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(target_modules="all-linear", **LORA))
    return model, lambda batch: model(**batch, use_cache=False).loss


def trl(base: Any, request: dict) -> tuple:
    """The same model with the loss of TRL's SFTTrainer, and the metrics that it computes along with it."""
    from peft import LoraConfig, get_peft_model

    trainer = trl_trainer(
        get_peft_model(base, LoraConfig(target_modules="all-linear", **LORA)), use_cpu=True, bf16=False
    )
    return trainer.model, lambda batch: trainer.compute_loss(trainer.model, dict(batch))


def trl_trainer(model: Any, **arguments: Any) -> Any:
    """TRL's SFTTrainer of a model, for its loss alone."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    # It asks for a tokenizer and for data, and uses neither here.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    config = SFTConfig(
        tempfile.mkdtemp(),
        gradient_checkpointing=False,  # as the other arms; its default computes every layer twice
        report_to="none",
        **arguments,
    )
    rows = Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}])
    return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def rows(base: Any, request: dict) -> tuple:
    """LoRA that computes the logits of supervised tokens alone: what is left when the trunk's output is compacted first."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(target_modules="all-linear", **LORA))
    return model, rows_loss(model)


def rows_loss(model: Any) -> Any:
    """The next-token loss of a PEFT model whose supervised tokens alone reach the lm_head."""
    from peft_caft.heads.backbone import Backbone
    from peft_caft.method.linear_cross_entropy import linear_cross_entropy
    from peft_caft.method.targets import Supervision

    trunk = model.get_base_model().base_model
    unembedding = Backbone.of(model).unembedding()

    def loss(batch: dict) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states = trunk(**inputs, use_cache=False).last_hidden_state
        own = Supervision.of(batch["labels"], 0).next_token
        total, _ = linear_cross_entropy(states.flatten(0, 1)[own.rows], own.targets, unembedding)
        return total / own.count

    return loss


def caft(base: Any, request: dict) -> tuple:
    """This package, with fresh heads, which cost what trained ones do."""
    from peft import get_peft_model

    from peft_caft import CAFTConfig

    config = CAFTConfig(
        head_type=request["arm"]["head_type"],
        num_auxiliary_heads=request["num_heads"],
        aux_token_fraction=request["arm"].get("fraction", 1.0),
        aux_loss_weight=AUX_LOSS_WEIGHT,
        aux_loss_decay=AUX_LOSS_DECAY,
        aux_loss_schedule="constant",
        target_modules="all-linear",
        **LORA,
    )
    model = get_peft_model(base, config)
    return model, lambda batch: model(**batch, use_cache=False).loss


def caft_llm(base: Any, request: dict) -> tuple:
    """The authors' package as its scripts/train.py sets up stage 2 with LoRA: frozen heads, and the loss of its Trainer."""
    import transformers
    from caft import add_auxiliary_heads, add_caft_loss
    from peft import LoraConfig, get_peft_model

    head_arch = {"residual": "linear", "decoder_layer": "transformer"}[request["arm"]["head_type"]]
    add_auxiliary_heads(
        base, caft_num_heads=request["num_heads"], head_arch=head_arch, caft_only_heads=False, requires_grad=False
    )
    model = get_peft_model(
        base, LoraConfig(target_modules=LLAMA_LINEAR, exclude_modules=r".*auxiliary_head.*", bias="none", **LORA)
    )
    add_caft_loss(transformers, AUX_LOSS_WEIGHT, AUX_LOSS_DECAY, caft_scheduler="constant", caft_only_heads=False)
    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[])
    trainer = transformers.trainer.Trainer(model, arguments)
    return model, lambda batch: trainer.compute_loss(model, batch)


ARMS = {"lora": lora, "trl": trl, "rows": rows, "caft": caft, "caft-llm": caft_llm}


# Loading and stepping.


class Arm:
    """A loaded model with its loss and optimizer."""

    def __init__(self, request: dict) -> None:
        import torch

        method = request["arm"]["method"]
        for module in IMPORTS[method]:
            importlib.import_module(module)
        torch.set_num_threads(request["threads"])
        torch.manual_seed(request["seed"])
        base = load_base(request["folder"])
        with torch.no_grad():  # loads the code of the matrix products
            base(torch.zeros(1, 8, dtype=torch.long))
        base_parameters = set(base.parameters())
        base_bytes = resident_bytes()
        model, self.loss = ARMS[method](base, request)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        added = [p for p in model.parameters() if p not in base_parameters and not p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.loaded = {
            "base_bytes": base_bytes,
            "loaded_bytes": resident_bytes(),
            "adapter_parameters": sum(p.numel() for p in trained),
            "head_parameters": sum(p.numel() for p in added),
            "versions": versions(),
        }

    def step(self, input_ids: list[int], supervised: int) -> dict:
        """Forward, backward, optimizer step, on one row whose last ``supervised`` tokens are its targets."""
        import torch

        ids = torch.tensor([input_ids])
        labels = torch.full_like(ids, -100)
        labels[:, -supervised:] = ids[:, -supervised:]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        forget_peak()
        started = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        value = loss.item()
        del loss
        return {
            "seconds": seconds,
            "loss": value,
            "peak_bytes": process_status("VmHWM"),
            "resting_bytes": process_status("VmRSS"),
        }


def load_base(folder: str) -> Any:
    """The model in fp32, its weights in memory of their own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", None)
    if rope and transformers_major() < 5 and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]  # transformers 5 writes it where earlier ones do not look
    dtype = {"dtype": torch.float32} if transformers_major() >= 5 else {"torch_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, **dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # safetensors maps the file, whose pages would only count once they are read
    return model


def transformers_major() -> int:
    return int(version("transformers").split(".")[0])


# Memory.


def process_status(field: str) -> int:
    """Bytes: VmRSS, resident now, or VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: got no {field}, expected one, as Linux has it.")


def resident_bytes() -> int:
    """What is resident when all that is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return process_status("VmRSS")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    arm: Arm | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("command") == "load":
            arm = Arm(request)
            answer = arm.loaded
        else:
            assert arm is not None
            answer = arm.step(**request)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
