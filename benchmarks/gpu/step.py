"""Job `step`: time and memory of a training step in bf16 at true sizes, random weights, half of the tokens supervised.

For each model the batch has as many rows of 2,048 tokens as plain LoRA without checkpointing can hold, beside the heads and optimizers of
the other arms; all arms then step in turns, under autocast as with ``TrainingArguments(bf16=True)``. "GiB" is the peak above model, adapters
and optimizers; "with heads" adds the arm's own heads, and what AdamW keeps of trained ones.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import torch
from flops import shapes_of
from peft import PeftModel
from transformers import PretrainedConfig

from peft_caft.basics.tables import markdown_table

from .measuring import Job, interleaved, peak_bytes, spread
from .models import ARMS, MODELS, TINY, TYPES, Stepper, counted, random_batch, random_model

TOKENS, TURNS, LARGEST_BATCH = 2048, 7, 64
SMALL = 1024  # hidden size up to which heads are trained too; on larger models they would take the room of the batch


def fits(stepper: Stepper) -> bool:
    """Whether the card holds two steps; memory is free again afterwards."""
    fitting = True
    try:
        stepper.prepare()
        for _ in range(2):
            stepper()
        if stepper.batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        fitting = False
    stepper.model.zero_grad(set_to_none=True)  # outside of the handler, whose traceback would keep the tensors
    gc.collect()
    torch.cuda.empty_cache()
    return fitting


def largest_batch(model: PeftModel, optimizers: dict, config: PretrainedConfig, device: torch.device) -> int:
    """Most rows with which plain LoRA fits; each try makes two steps."""

    def holds(rows: int) -> bool:
        return fits(Stepper(ARMS[0], model, optimizers, random_batch(config, rows, TOKENS, device)))

    low, high = 0, 1
    while high <= LARGEST_BATCH and holds(high):
        low, high = high, 2 * high
    high = min(high, LARGEST_BATCH + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def measure(job: Job, name: str, config: PretrainedConfig) -> None:
    """Write the figures of all arms on one model."""
    trained_heads = config.hidden_size <= SMALL
    model, optimizers, shapes = random_model(config, job.device, trained_heads), {}, shapes_of(config)
    arms = [arm for arm in ARMS if trained_heads or not arm.trained]
    tokens = 32 if job.smoke else TOKENS
    little = random_batch(config, 1, 32, job.device)
    for arm in arms:  # so that the states of all optimizers are there before the batch is chosen
        if arm.method in TYPES:
            fits(Stepper(arm, model, optimizers, little))
    rows = 2 if job.smoke else largest_batch(model, optimizers, config, job.device)
    if not rows:
        job.write(kind="failed", model=name, failure="plain LoRA does not fit with a single row")
        return
    batch = random_batch(config, rows, tokens, job.device)
    job.write(kind="model", model=name, rows=rows, tokens=tokens)
    steppers: dict[str, Stepper] = {}
    for arm in arms:
        try:
            stepper = Stepper(arm, model, optimizers, batch)
        except Exception as error:  # TRL is missing, or another version: its arm must not end the others
            job.write(kind="failed", model=name, arm=arm.name, failure=str(error)[:300])
            continue
        if not fits(stepper):
            job.write(kind="failed", model=name, arm=arm.name, failure="does not fit")
            continue
        stepper.prepare()
        heads = model.base_model.auxiliary_heads[arm.adapter]
        job.write(
            kind="memory",
            model=name,
            arm=arm.name,
            peak_bytes=peak_bytes(stepper, job.device),
            # AdamW keeps two values for each parameter that it trains.
            head_bytes=sum(p.numel() * p.element_size() for p in heads.parameters()) * (3 if arm.trained else 1)
            if arm.method in TYPES
            else 0,
            flops=counted(shapes, arm, tokens) * rows * tokens,
        )
        steppers[arm.name] = stepper
    interleaved(
        steppers,
        1 if job.smoke else TURNS,
        job.device,
        warm_up=0 if job.smoke else 1,
        after_turn=lambda seconds: job.write(kind="turn", model=name, seconds=seconds),
    )


def main() -> None:
    job = Job.begin(
        "step",
        __doc__,
        models={"nargs": "*", "choices": list(MODELS), "default": list(MODELS), "help": "models, in this order"},
        seconds={"type": float, "default": 400, "help": "no model is begun later than that after the start"},
    )
    started = time.perf_counter()
    for name, config in {"tiny": TINY}.items() if job.smoke else ((n, MODELS[n]) for n in job.options.models):
        if time.perf_counter() - started > job.options.seconds:
            job.write(kind="failed", model=name, failure="left out: the time was used up")
            continue
        try:
            measure(job, name, config)
        except torch.OutOfMemoryError as error:
            job.write(kind="failed", model=name, failure=str(error)[:300])
        gc.collect()
        torch.cuda.empty_cache()
        job.report(table(job.records()))


def arms_of(found: list[dict]) -> Iterator[dict]:
    """For each model and arm that was timed: its records in one, with spreads of time and of its ratio to LoRA."""
    sizes = {r["model"]: r for r in found if r["kind"] == "model"}
    memory = {(r["model"], r["arm"]): r for r in found if r["kind"] == "memory"}
    baselines = {arm.name: arm.baseline for arm in ARMS}
    for name, size in sizes.items():
        turns = [r["seconds"] for r in found if r["kind"] == "turn" and r["model"] == name]
        for arm in turns[0] if turns else ():
            base, ratios = baselines[arm], [turn[arm] / turn[baselines[arm]] for turn in turns]
            seconds = spread([turn[arm] for turn in turns])
            own, lora = memory[name, arm], memory[name, base]
            yield (
                size
                | own
                | {"seconds": seconds, "ratio": spread(ratios), "counted": own["flops"] / lora["flops"], "lora": lora}
            )


def table(found: list[dict], foretold: dict[tuple[str, str], float] | None = None) -> str:
    """Each arm's time and memory over LoRA's, and the share of the card's operations that its counted ones reach.

    Args:
        foretold: (model, arm) -> bytes of a step's memory by `peft_caft.planning`, for a column of its own.
    """
    rows = []
    for arm in arms_of(found):
        ratio, median = arm["ratio"], arm["seconds"]["median"]
        lora = arm["lora"]["peak_bytes"]  # 0 on a CPU, where it is not measured
        over = f"{(arm['peak_bytes'] + arm['head_bytes']) / lora:.2f}" if lora else "-"
        planned = (foretold or {}).get((arm["model"], arm["arm"]))
        rows.append([
            f"{arm['model']}, {arm['rows']} x {arm['tokens']:,}", arm["arm"], f"{median * 1000:,.0f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})", f"{arm['counted']:.3f}",
            f"{arm['flops'] / median / found[0]['flops_per_second']:.0%}", f"{arm['peak_bytes'] / 2**30:.2f}", *([] if foretold is None else ["-" if planned is None else f"{planned / 2**30:.2f}"]), over,
        ])  # fmt: skip
    header = ["model, batch", "arm", "ms", "over LoRA", "counted", "of the card", "GiB", "with heads, over LoRA"]
    if foretold is not None:
        header.insert(-1, "GiB foretold")
    failed = [f"{r['model']}, {r.get('arm', 'all arms')}: {r['failure']}" for r in found if r["kind"] == "failed"]
    return "\n".join([markdown_table(header, rows), *failed])


if __name__ == "__main__":
    main()
