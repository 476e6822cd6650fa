"""Job `step`: time and memory of a training step in bf16 at true sizes, random weights, half of the tokens supervised.

For each model the batch has as many rows of 2,048 tokens as plain LoRA without checkpointing can hold; all arms then step in turns.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from peft_caft.basics.tables import markdown_table

from .measuring import Job, interleaved, peak_bytes, spread
from .models import ARMS, MODELS, TINY, Arm, Stepper, counted, random_batch, random_model

TOKENS, TURNS, LARGEST_BATCH = 2048, 7, 64


def fits(stepper: Stepper, batch: dict) -> bool:
    """Whether the card holds two steps; the first makes the optimizer's state."""
    try:
        for _ in range(2):
            stepper(batch)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        stepper.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def largest_batch(stepper: Stepper, config: Any, device: torch.device) -> int:
    """Most rows that fit, within one, by trying; each try makes two steps."""
    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(stepper, random_batch(config, high, TOKENS, device)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(stepper, random_batch(config, middle, TOKENS, device)):
            low = middle
        else:
            high = middle
    return low


def measure(job: Job, name: str, config: Any) -> None:
    """Write the figures of all arms on one model."""
    trained_heads = job.smoke or config.hidden_size <= 1024  # on a large model they would take the room of the batch
    model = random_model(config, job.device, trained_heads)
    tokens = 32 if job.smoke else TOKENS
    rows = 2 if job.smoke else largest_batch(Stepper(ARMS[0], model), config, job.device)
    batch = random_batch(config, rows, tokens, job.device)
    job.write(kind="model", model=name, rows=rows, tokens=tokens)
    steppers: dict[Arm, Stepper] = {}
    memory: dict[Arm, int] = {}
    for arm in ARMS:
        if arm.trained and not trained_heads:
            continue
        try:
            stepper = Stepper(arm, model)
            stepper(batch)
            stepper(batch)
            memory[arm] = peak_bytes(lambda stepper=stepper: stepper(batch), job.device)
            steppers[arm] = stepper
        except (torch.OutOfMemoryError, ImportError) as error:
            job.write(kind="failed", model=name, arm=arm.name, failure=str(error)[:300])
            model.zero_grad(set_to_none=True)
    functions = {arm.name: lambda stepper=stepper: stepper(batch) for arm, stepper in steppers.items()}
    times = interleaved(functions, 1 if job.smoke else TURNS, job.device, warm_up=0 if job.smoke else 1)
    for arm in steppers:
        base = times[arm.baseline]
        ratios = [own / other for own, other in zip(times[arm.name], base, strict=True)]
        heads = model.base_model.auxiliary_heads[arm.adapter]
        job.write(
            kind="time",
            model=name,
            arm=arm.name,
            baseline=arm.baseline,
            seconds=spread(times[arm.name]),
            ratio=spread(ratios),
            flops=counted(model, arm, tokens) * rows * tokens,
            peak_bytes=memory[arm],
            head_bytes=sum(p.numel() * p.element_size() for p in heads.parameters()),
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


def table(found: list[dict]) -> str:
    """Each arm's time and memory over LoRA's, and the share of the card's operations that its counted ones reach."""
    ceiling = found[0]["flops_per_second"]
    sizes = {
        record["model"]: f"{record['rows']} x {record['tokens']:,}" for record in found if record["kind"] == "model"
    }
    times = {(r["model"], r["arm"]): r for r in found if r["kind"] == "time"}
    rows = []
    for (model, arm), record in times.items():
        base = times[model, record["baseline"]]
        ratio, seconds = record["ratio"], record["seconds"]["median"]
        rows.append([
            f"{model}, {sizes[model]}", arm, f"{seconds * 1000:,.0f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})", f"{record['flops'] / base['flops']:.3f}",
            f"{record['flops'] / seconds / ceiling:.0%}", f"{record['peak_bytes'] / 2**30:.2f}",
            f"{(record['peak_bytes'] + record['head_bytes'] * arm.startswith('CAFT')) / max(base['peak_bytes'], 1):.2f}",
        ])  # fmt: skip
    header = ["model, batch", "arm", "ms", "over LoRA", "counted", "of the card", "GiB", "with heads, over LoRA"]
    failed = [f"{r['model']}, {r.get('arm', 'all arms')}: {r['failure']}" for r in found if r["kind"] == "failed"]
    return "\n".join([markdown_table(header, rows), *failed])


if __name__ == "__main__":
    main()
