"""`peft-caft plan` against real training steps: the memory that a step takes above the loaded model, on this machine's CPU.

    python benchmarks/plan_check.py [--gemma FOLDER]

writes ``plan_check/table.md`` beside this file. Each step runs in a process of its own and is measured twice: by the kernel, as
peak of the resident memory (VmHWM), which also sees what operations allocate inside; and by the bytes of tensors alive
(`peft_caft.planning.live_memory`). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from flops import MODELS
from peft import PeftModel, get_peft_model
from step_models import GEMMA, LARGE_VOCABULARY, SMOLLM2, random_llama_config
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from peft_caft.basics.checkpoints import load_config
from peft_caft.basics.files import write_text
from peft_caft.basics.tables import markdown_table
from peft_caft.hub.embedded_model import embedded_model
from peft_caft.planning.live_memory import LiveMemory
from peft_caft.planning.plan import METHODS, peft_config
from peft_caft.planning.settings import PlanSettings
from peft_caft.planning.simulated_step import Batch, model_on_meta, simulate_step

SETTINGS = PlanSettings(model="", tokens=512, batch_size=1, supervised=0.5, dtype="float32", device="cpu")
BATCH = Batch(SETTINGS.batch_size, SETTINGS.tokens, SETTINGS.supervised)
CLAIM = 0.15  # the plan is to be right within that
NAMES = (SMOLLM2, LARGE_VOCABULARY, GEMMA)


def config_of(name: str, gemma: str | None) -> PretrainedConfig:
    if name == GEMMA:
        return load_config(gemma) if gemma else MODELS[name]
    return load_config(str(embedded_model())) if name == SMOLLM2 else random_llama_config(128_256)


def measure(name: str, method: str, checkpointing: bool, gemma: str | None) -> dict[str, float]:
    """Bytes that a step takes above the model with its gradients, by either way of measuring."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of(name, gemma), dtype=torch.float32)
    base.config.use_cache = False  # as Trainer has it
    model = get_peft_model(base, peft_config(SETTINGS, method)).train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, Batch(1, 16))  # makes the gradients, and what libraries keep
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    step(model, BATCH)
    peak = resident("VmHWM") - before
    memory = LiveMemory()
    memory.leave_out([*model.parameters(), *model.buffers()])
    memory.leave_out(p.grad for p in model.parameters() if p.grad is not None)
    with memory:
        step(model, BATCH)
    return {"resident": peak, "tensors": memory.peak}


def step(model: PeftModel, batch: Batch) -> None:
    arguments = batch.arguments()
    arguments["input_ids"].random_(10, 1000)
    arguments["labels"][arguments["labels"] >= 0] = 7
    model(**arguments).loss.backward()


def resident(field: str) -> int:
    """Bytes that the kernel counts for this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measured_apart(name: str, method: str, checkpointing: bool, gemma: str | None) -> dict[str, float]:
    """`measure` in a process of its own, whose allocator gives large blocks back to the system when they are freed."""
    command = [sys.executable, __file__, "--measure", name, method, str(int(checkpointing))]
    command += ["--gemma", gemma] if gemma else []
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def compared(name: str, gemma: str | None) -> Iterator[tuple[list[str], bool]]:
    """A row of the table for each step, and whether it keeps what is claimed."""
    for method in METHODS:
        model = model_on_meta(config_of(name, gemma), peft_config(SETTINGS, method), torch.float32)
        for checkpointing in (False, True):
            planned = simulate_step(model, BATCH, checkpointing, device="cpu").total
            found = measured_apart(name, method, checkpointing, gemma)
            deviations = [planned / found[way] - 1 for way in ("tensors", "resident")]
            sizes = [f"{size / 2**20:,.1f}" for size in (planned, found["tensors"], found["resident"])]
            row = [name, method, "yes" if checkpointing else "no", *sizes]
            row += [f"{round(deviation, 3) + 0.0:+.1%}" for deviation in deviations]  # + 0.0: no "-0.0%"
            print(*row, sep="\t", flush=True)
            yield row, all(abs(deviation) <= CLAIM for deviation in deviations)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare peft-caft plan with measured steps.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "plan_check", help="folder")
    parser.add_argument(
        "--gemma", help="folder of Gemma 3 270M, or its config.json; unset takes the sizes in flops.py"
    )
    parser.add_argument(
        "--measure", nargs=3, metavar=("MODEL", "METHOD", "CHECKPOINTING"), help="of this script itself"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.measure:
        name, method, checkpointing = arguments.measure
        print(json.dumps(measure(name, method, checkpointing == "1", arguments.gemma)))
        return
    results = [result for name in NAMES for result in compared(name, arguments.gemma)]
    columns = ["model", "method", "checkpointing", "plan", "tensors", "resident", "plan / tensors", "plan / resident"]
    text = (
        f"{markdown_table(columns, [row for row, _ in results])}\n\nPeak memory of a training step above the loaded model and its gradients, MiB: planned "
        "from the configuration, measured as bytes of tensors alive, and as resident memory of the process. "
        f"{SETTINGS.tokens} tokens, batch {SETTINGS.batch_size}, {SETTINGS.supervised:.0%} supervised, n = "
        f"{SETTINGS.num_auxiliary_heads + 1}, LoRA of rank {SETTINGS.r} on all linear maps, fp32, CPU, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads."
    )
    write_text(arguments.output / "table.md", text + "\n")
    print(text)
    if not all(kept for _, kept in results):
        sys.exit(f"plan_check: a plan is off by more than {CLAIM:.0%}")


if __name__ == "__main__":
    main()
