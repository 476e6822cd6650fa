"""Makes ``RESULTS.md`` and its plots of the figures that `step.py` has measured.

python benchmarks/step_results.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from flops import MODELS, shapes_of
from flops import table as limit_table
from matplotlib.figure import Figure
from step import ARMS, BASELINE, SWEPT, ratios
from step_models import GEMMA, LARGE_VOCABULARY, SMOLLM2, random_llama_config

from peft_caft.basics.files import replacing, write_text
from peft_caft.basics.provenance import listed
from peft_caft.basics.tables import markdown_table
from peft_caft.planning.flops import ModelShapes, caft_step, lora_step

HERE = Path(__file__).parent
LABELS = {
    "n": "tokens predicted, n",
    "vocabulary": "vocabulary",
    "tokens": "tokens in a row",
    "s": "share of supervised tokens, s",
}
# What was asked of the measured ratios: model, arm, over which arm, of what, at most.
AIMS = [
    (SMOLLM2, "CAFT, residual", BASELINE, "time", 1.27),
    (SMOLLM2, "CAFT, decoder layer", BASELINE, "time", 1.40),
    (SMOLLM2, "CAFT, residual, p = .25", BASELINE, "time", 1.00),
    (SMOLLM2, "CAFT, decoder layer, p = .25", BASELINE, "time", 1.10),
    (SMOLLM2, "CAFT, residual", "caft-llm, residual", "time", 0.60),
    (SMOLLM2, "CAFT, decoder layer", "caft-llm, decoder layer", "time", 0.62),
    (LARGE_VOCABULARY, "CAFT, residual", "caft-llm, residual", "time", 0.30),
    (LARGE_VOCABULARY, "CAFT, decoder layer", "caft-llm, decoder layer", "time", 0.32),
    (SMOLLM2, "CAFT, residual", BASELINE, "memory of the step", 0.75),
    (SMOLLM2, "CAFT, decoder layer", BASELINE, "memory of the step", 0.76),
    (LARGE_VOCABULARY, "CAFT, residual", BASELINE, "memory of the step", 0.26),
    (LARGE_VOCABULARY, "CAFT, decoder layer", BASELINE, "memory of the step", 0.27),
    (SMOLLM2, "CAFT, residual", "caft-llm, residual", "memory of the step", 1 / 2.9),
    (SMOLLM2, "CAFT, decoder layer", "caft-llm, decoder layer", "memory of the step", 1 / 2.9),
    (LARGE_VOCABULARY, "CAFT, residual", "caft-llm, residual", "memory of the step", 1 / 16),
]


def shapes_for(model: str) -> ModelShapes | None:
    """Of a model that this benchmark knows; None for a folder, whose figures get no limit."""
    configs = MODELS | {LARGE_VOCABULARY: random_llama_config(128_256)}
    return shapes_of(configs[model]) if model in configs else None


def limit(arm: str, shapes: ModelShapes | None, n: int, tokens: int, s: float) -> float | None:
    """Operations of an arm's step over those of LoRA's; None for other packages and unknown models."""
    if shapes is None:
        return None
    method = ARMS[arm]["method"]
    lora = lora_step(shapes, tokens / 2).total
    if method == "lora":
        return 1.0
    if method == "rows":
        return lora_step(shapes, tokens / 2, s).total / lora
    if method != "caft":
        return None
    fraction = ARMS[arm].get("fraction", 1.0)
    step = caft_step(shapes, tokens / 2, ARMS[arm]["head_type"], n - 1, s, fraction)
    return step.total / lora


def model_table(record: dict[str, Any]) -> str:
    settings, seconds, memory = record["settings"], record["seconds"], record["memory"]
    shapes = shapes_for(record["model"])
    yardstick = "LoRA, supervised rows alone"
    rows = []
    for arm in seconds:
        least = limit(arm, shapes, settings["n"], settings["tokens"], settings["s"])
        found = ratios(seconds[arm], seconds[BASELINE])
        lean = ratios(seconds[arm], seconds[yardstick])["median"] if yardstick in seconds else None
        step, added = memory[arm]["step"], memory[arm]["added"]
        rows.append(
            [
                arm,
                f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})",
                "" if least is None else f"{least:.2f}",
                "" if lean is None else f"{lean:.2f}",
                f"{step / 2**20:,.0f}",
                f"{step / memory[BASELINE]['step']:.2f}",
                f"{(step + added) / 2**20:,.0f}",
                f"{(step + added) / (memory[BASELINE]['step'] + memory[BASELINE]['added']):.2f}",
            ]
        )
    columns = [
        "arm",
        "time / LoRA, median (quartiles)",
        "limit",
        "time / LoRA on rows",
        "step, MiB",
        "step / LoRA",
        "above the base model, MiB",
        "above it / LoRA",
    ]
    seconds_of_lora = statistics.median(seconds[BASELINE])
    return (
        f"{markdown_table(columns, rows)}\n\nA LoRA step took {seconds_of_lora:.2f} s (median); {settings['turns']} turns, commit "
        f"{(record['git_commit'] or 'none')[:9]}.\n\n    {record['command']}"
    )


def aims_table(records: dict[str, dict[str, Any]]) -> str:
    rows = []
    for model, arm, over, what, most in AIMS:
        record = records.get(model)
        if record is None or arm not in record["seconds"] or over not in record["seconds"]:
            continue
        if what == "time":
            value = ratios(record["seconds"][arm], record["seconds"][over])["median"]
        else:
            value = record["memory"][arm]["step"] / record["memory"][over]["step"]
        rows.append([model, arm, over, what, f"{most:.4g}", f"{value:.3f}", "met" if value <= most else "missed"])
    return markdown_table(["model", "arm", "over", "of", "at most", "measured", ""], rows)


def plot_models(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and memory of every arm over LoRA's; a black line marks the limit."""
    figure = Figure(figsize=(11, 2.6 + 2.2 * len(records)), layout="constrained")
    for row, (name, record) in enumerate(records.items()):
        panels = [figure.add_subplot(len(records), 2, 2 * row + column) for column in (1, 2)]
        arms = list(record["seconds"])
        places = range(len(arms), 0, -1)
        colours = [
            "#0072B2" if a.startswith("CAFT") else "#D55E00" if a.startswith("caft") else "#A9B4BC" for a in arms
        ]
        found = [ratios(record["seconds"][arm], record["seconds"][BASELINE]) for arm in arms]
        times = [f["median"] for f in found]
        spread = [[f["median"] - f["low"] for f in found], [f["high"] - f["median"] for f in found]]
        panels[0].barh(places, times, color=colours, xerr=spread, ecolor="#555555")
        settings, shapes = record["settings"], shapes_for(record["model"])
        for place, arm in zip(places, arms, strict=True):
            if (least := limit(arm, shapes, settings["n"], settings["tokens"], settings["s"])) is not None:
                panels[0].plot([least, least], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        memory = [record["memory"][arm]["step"] / record["memory"][BASELINE]["step"] for arm in arms]
        panels[1].barh(places, memory, color=colours)
        for panel, values, ends in zip(panels, (times, memory), ([f["high"] for f in found], memory), strict=True):
            panel.axvline(1, color="grey", linewidth=0.8, linestyle=":")
            for place, value, end in zip(places, values, ends, strict=True):
                panel.annotate(
                    f"{value:.2f}",
                    (max(value, end), place),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            panel.margins(x=0.12)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set(yticks=list(places))
        panels[0].set_title(f"{name}: step time / LoRA (line: least operations)", fontsize=10)
        panels[0].set_yticklabels(arms, fontsize=8)
        panels[1].set(yticks=[])
        panels[1].set_title("peak memory of a step / LoRA", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def plot_sweeps(record: dict[str, Any], path: Path) -> None:
    """How the time over LoRA's grows with one setting; solid as measured, dashed the limit."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for panel, (name, values) in zip(figure.subplots(2, 2).flat, record["values"].items(), strict=True):
        for colour, arm in zip(("#0072B2", "#D55E00"), SWEPT[1:], strict=True):
            found, least = [], []
            for value in values:
                seconds = record["seconds"][name][str(value)]
                found.append(ratios(seconds[arm], seconds[BASELINE]))
                chosen = record["settings"] | {name: value}
                shapes = shapes_of(random_llama_config(value) if name == "vocabulary" else MODELS[SMOLLM2])
                least.append(limit(arm, shapes, chosen["n"], chosen["tokens"], chosen["s"]))
            medians = [f["median"] for f in found]
            spread = [[f["median"] - f["low"] for f in found], [f["high"] - f["median"] for f in found]]
            panel.errorbar(values, medians, yerr=spread, color=colour, marker="o", capsize=2, label=arm)
            panel.plot(values, least, "--", color=colour, label=f"{arm}, limit")
        if name in ("vocabulary", "tokens"):
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
        model = "random Llama" if name == "vocabulary" else SMOLLM2
        panel.set(xlabel=LABELS[name], ylabel="step time / LoRA", title=model)
        panel.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def origin(record: dict[str, Any]) -> str:
    settings = record["settings"]
    text = (
        f"{settings['tokens']} tokens, batch 1, {settings['s']:.0%} of them supervised, n = {settings['n']}, fp32, frozen heads, "
        f"LoRA r = 8 on all linear maps, AdamW; a first turn warms up, "
        f"{settings['threads']} threads, one seed (which decides nothing that costs). {record['machine']}; "
        f"{listed(record['versions'])}"
    )
    others = {}
    for arm in record.get("memory", {}).values():
        others |= {k: v for k, v in arm["versions"].items() if k in ("trl", "caft-llm")}
    if "caft-llm" in others:
        authors = next(a["versions"] for a in record["memory"].values() if "caft-llm" in a["versions"])
        others["caft-llm"] += f" (with transformers {authors['transformers']}, torch {authors['torch']})"
    return text + "".join(f"; {name} {number}" for name, number in others.items()) + "."


def report(records: dict[str, dict[str, Any]], sweeps: dict[str, Any] | None) -> str:
    first = next(iter(records.values()))
    parts = [
        "# What a training step costs",
        "Made by `make bench` (`benchmarks/step.py`, then `benchmarks/step_results.py`); do not edit.",
        origin(first),
        "*time / LoRA*: PEFT's LoRA with the loss of transformers, which computes the logits of all tokens; in one interleaved "
        "run, medians of the ratios within a turn. *limit*: the same ratio in counted operations (`peft_caft.planning.flops`); below it is "
        "who saves more than products of matrices. *time / LoRA on rows*: over a LoRA that computes the logits of supervised "
        "tokens alone with this package's cross entropy, the honest yardstick. *step*: peak of the resident memory in a step "
        "above that of the loaded model with its adapter and heads: activations, gradients, losses and the optimizer's state; "
        "*above the base model*: with adapter and heads. Measured in other processes, whose allocator gives back what is freed. TRL's loss on a CPU scores all tokens, since its "
        "compaction needs Triton, and computes entropy and accuracy as well. *caft-llm*: the package of CAFT's authors, version "
        "0.0.1, which knows Llama alone; with LoRA dropout 0, tied embeddings and torch's AdamW as all others have.",
        "![Time and memory of every arm over LoRA's](step/models.png)",
    ]
    for name, record in records.items():
        parts += [f"## {name}", model_table(record)]
    parts += ["## What was aimed at", aims_table(records)]
    if sweeps is not None:
        parts += [
            "## How the cost grows",
            f"One setting changed at a time; {sweeps['settings']['turns']} turns each. Bars: quartiles.",
            "![Step time over LoRA's against n, vocabulary, tokens and s; measured and limit](step/sweeps.png)",
        ]
    if (plans := HERE / "plan_check" / "table.md").exists():
        parts += [
            "## `peft-caft plan` against measured memory",
            "Made by `benchmarks/plan_check.py`.",
            plans.read_text().strip(),
        ]
    if (noise := HERE / "sampling_noise" / "table.md").exists():
        parts += [
            "## Noise of sampled positions",
            "Made by `benchmarks/sampling_noise.py`.",
            noise.read_text().strip(),
        ]
    limits = limit_table({name: shapes_of(config) for name, config in MODELS.items()})
    parts += ["## The limit for larger models", "Counted, not measured (`benchmarks/flops.py`).", limits]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make RESULTS.md of the figures of step.py.")
    parser.add_argument("--figures", type=Path, default=HERE / "step", help="folder that step.py wrote")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    found = [json.loads(file.read_text()) for file in sorted(arguments.figures.glob("*.json"))]
    by_model = {record["model"]: record for record in found if "model" in record}
    order = [name for name in (SMOLLM2, LARGE_VOCABULARY, GEMMA) if name in by_model]
    records = {name: by_model[name] for name in [*order, *(set(by_model) - set(order))]}
    if not records:
        parser.error(f"--figures: got {arguments.figures}, which holds no figures; run step.py first.")
    sweeps = next((record for record in found if "values" in record), None)
    plot_models(records, arguments.figures / "models.png")
    if sweeps is not None:
        plot_sweeps(sweeps, arguments.figures / "sweeps.png")
    write_text(arguments.output, report(records, sweeps))
    print(aims_table(records))


if __name__ == "__main__":
    main()
