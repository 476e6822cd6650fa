"""Tables and plots of the jobs' results, made at home: ``python -m gpu.results [FOLDER]`` in benchmarks/.

For `step` it simulates on a CPU what `peft-caft plan` foretells of the memory of each step, and draws time over LoRA's; for `kernel` it
draws time over the size of a chunk.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from flops import CLAIM, RANK
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PretrainedConfig

from peft_caft.basics.plots import RUN_COLOURS, save_figure, tidy_axes
from peft_caft.basics.provenance import listed
from peft_caft.planning.plan import peft_config
from peft_caft.planning.settings import PlanSettings
from peft_caft.planning.simulated_step import Batch, model_on_meta, simulate_step

from .models import ARMS, MODELS, NUM_HEADS, TINY, TYPES, Arm
from .step import arms_of, table


def foretold(config: PretrainedConfig, arm: Arm, rows: int, tokens: int) -> float:
    """Bytes at the peak of a step, without parameters, gradients and optimizer; of plain LoRA or frozen heads."""
    settings = PlanSettings(
        "", tokens=tokens, batch_size=rows, r=RANK, num_auxiliary_heads=NUM_HEADS, aux_token_fraction=arm.fraction
    )
    model = model_on_meta(config, peft_config(settings, arm.method), torch.bfloat16, "sdpa")
    return simulate_step(model, Batch(rows, tokens, 0.5), arm.checkpointing, autocast=True).total


def step_results(folder: Path, found: list[dict]) -> None:
    arms = {arm.name: arm for arm in ARMS if arm.method in ("lora", *TYPES) and not arm.trained}
    timed = [record for record in arms_of(found) if record["arm"] in arms]
    planned = {
        (r["model"], r["arm"]): foretold(MODELS.get(r["model"], TINY), arms[r["arm"]], r["rows"], r["tokens"])
        for r in tqdm(timed, desc="Simulated steps", unit=" steps")
    }
    origin = found[0]
    head = f"{origin['card']}, CUDA {origin['cuda']}, {listed(origin['versions'])}, commit {origin['git_commit']}"
    (folder / "step.md").write_text(f"{head}\n\n{table(found, planned)}\n", encoding="utf-8")
    models = list(dict.fromkeys(record["model"] for record in arms_of(found)))
    if not models:  # the job was stopped before its first turn
        return
    figure = Figure(figsize=(3.6 + 3 * len(models), 5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models, strict=True):
        baselines = {arm.name for arm in ARMS if arm.method == "lora"}
        own = [record for record in arms_of(found) if record["model"] == model and record["arm"] not in baselines]
        medians = [record["ratio"]["median"] for record in own]
        spans = [[abs(r["ratio"][end] - r["ratio"]["median"]) for r in own] for end in ("low", "high")]
        panel.barh([r["arm"] for r in own], medians, xerr=spans, color=RUN_COLOURS[0], label="measured, quartiles")
        panel.plot([r["counted"] for r in own], [r["arm"] for r in own], "o", color=RUN_COLOURS[1], label="counted")
        panel.axvline(1 + CLAIM, color="black", linestyle=":", linewidth=0.8)
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set(title=model, xlabel="time of a step over LoRA's")
        tidy_axes(panel)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, folder / "step.png")


def kernel_results(folder: Path, found: list[dict]) -> None:
    timed = [record for record in found if record["kind"] == "time"]
    cases = list(dict.fromkeys((record["layer"], record["rows"]) for record in timed))
    figure = Figure(figsize=(4 * len(cases), 3.6), layout="constrained")
    for panel, (layer, rows) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [record for record in timed if (record["layer"], record["rows"]) == (layer, rows)]
        for index, way in enumerate(dict.fromkeys(record["way"].partition(" 2^")[0] for record in own)):
            of_way = [record["way"].partition(" 2^")[2] for record in own if record["way"].partition(" 2^")[0] == way]
            medians = [r["seconds"]["median"] * 1000 for r in own if r["way"].partition(" 2^")[0] == way]
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            if of_way[0]:
                panel.plot([int(size) for size in of_way], medians, "o-", color=colour, label=way)
            else:
                panel.axhline(medians[0], color=colour, linestyle="--", label=way)
        panel.set(title=f"{layer}, {rows:,} rows", xlabel="logits of a chunk, power of two", ylabel="ms")
        tidy_axes(panel)
        panel.legend(fontsize=8)
    save_figure(figure, folder / "kernel.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    folder = parser.parse_args().folder
    for name, made in (("step", step_results), ("kernel", kernel_results)):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            made(folder, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
            print(f"{name}: written to {folder}")


if __name__ == "__main__":
    main()
