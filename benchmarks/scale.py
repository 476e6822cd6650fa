"""LoRA and CAFT on 7B, 13B and 70B with 8 GPUs: memory and communication, simulated and counted, since no such machine is at hand.

    python benchmarks/scale.py

writes ``SCALE.md`` and ``scale.png`` beside this file, in ten minutes. The figures are those of `peft-caft plan`. For FSDP2 a step is
also run with torch's and accelerate's code under a fake process group (`simulated_fsdp`), and what its collectives send and its
devices keep is compared with the arithmetic; the script fails where they differ by more than `CLAIM`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from simulated_fsdp import fake_processes, sharded_step
from transformers import LlamaConfig, PretrainedConfig
from transformers.utils import logging

from peft_caft.basics.files import replacing, write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table
from peft_caft.planning.communication import communication
from peft_caft.planning.memory import ModelBytes
from peft_caft.planning.plan import GIB, METHODS, Option, Plan, peft_config, plan
from peft_caft.planning.report import METHOD_NAMES
from peft_caft.planning.settings import PlanSettings
from peft_caft.planning.simulated_step import Batch, model_on_meta

GB = 10**9
CLAIM = 0.01
SETTINGS = PlanSettings(
    model="", tokens=512, batch_size=8, gpus=8, gpu_memory=79.0
)  # of an H100's 80 GB that CUDA offers


def _llama_2(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


# As the config.json of each model's repository has them.
MODELS: dict[str, PretrainedConfig] = {
    "Llama-2 7B": _llama_2(4096, 11_008, 32, 32, 32),
    "Llama-2 13B": _llama_2(5120, 13_824, 40, 40, 40),
    "Llama-2 70B": _llama_2(8192, 28_672, 80, 64, 8),
}


def planned(config: PretrainedConfig, settings: PlanSettings = SETTINGS) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return plan(replace(settings, model=folder))


def compared(
    name: str, config: PretrainedConfig, settings: PlanSettings = SETTINGS
) -> Iterator[tuple[list[str], float]]:
    """For each FSDP2 step that is run, a row of what was seen, and by which share it differs most from the arithmetic."""
    batch = Batch(settings.batch_size, settings.tokens, settings.supervised)
    for method in METHODS:
        for checkpointing in (False, True):
            model = model_on_meta(config, peft_config(settings, method), getattr(torch, settings.dtype))
            sent, sizes = communication(model, "FSDP", settings.gpus), ModelBytes.of(model)
            with fake_processes(settings.gpus):
                found = sharded_step(model, batch, checkpointing)
            pairs = [
                *((getattr(found.sent, part), getattr(sent, part)) for part in ("forward", "backward", "gradients")),
                (found.shards, (sizes.base + sizes.adapter + sizes.heads) / settings.gpus),
                (found.whole, sizes.gathered("FSDP")),
            ]
            worst = max((seen / counted - 1 for seen, counted in pairs), key=abs)
            row = [name, METHOD_NAMES[method], "yes" if checkpointing else "no"]
            row += [f"{seen / GB:,.3f}" for seen, _ in pairs] + [f"{worst + 0.0:+.3%}"]
            print(*row, sep="\t", flush=True)
            yield row, worst


def memory_table(found: Plan) -> str:
    """Memory of each GPU in GiB; what does not fit is in brackets."""
    limit = found.settings.gpu_memory
    assert limit is not None
    rows = []
    for place, qlora, checkpointing in dict.fromkeys(_way(option) for option in found.options):
        options = {o.method: o for o in found.options if _way(o) == (place, qlora, checkpointing)}
        cells = [
            f"{o.memory.total / GIB:.1f}" if o.fits(limit) else f"({o.memory.total / GIB:.1f})"
            for o in options.values()
        ]
        rows.append([place, "QLoRA" if qlora else found.settings.dtype, "yes" if checkpointing else "no", *cells])
    return markdown_table(["", "weights", "checkpointing", *(METHOD_NAMES[method] for method in METHODS)], rows)


def _way(option: Option) -> tuple[str, bool, bool]:
    return option.placement, option.qlora, option.gradient_checkpointing


def communication_table(plans: dict[str, Plan]) -> str:
    """GB that each GPU sends in a step, and what CAFT adds to it."""
    rows = []
    for name, found in plans.items():
        for place, qlora, _ in dict.fromkeys((o.placement, o.qlora, False) for o in found.options):
            sent = _sent(found, place, qlora)
            if place in ("DDP", "ZeRO-2") and qlora:
                continue  # the adapter alone travels
            weights = "either" if place in ("DDP", "ZeRO-2") else "QLoRA" if qlora else found.settings.dtype
            caft = [f"{sent[m] / GB:,.2f} ({sent[m] / sent['lora'] - 1:+.1%})" for m in METHODS[1:]]
            rows.append([name, place, weights, f"{sent['lora'] / GB:,.2f}", *caft])
    return markdown_table(["", "", "weights", *(METHOD_NAMES[method] for method in METHODS)], rows)


def _sent(found: Plan, place: str, qlora: bool) -> dict[str, float]:
    """Bytes by method; gradient checkpointing does not change them."""
    options = [o for o in found.options if (o.placement, o.qlora) == (place, qlora)]
    return {option.method: option.communication.total for option in options}


def plot(plans: dict[str, Plan], path: Path) -> None:
    """For each model, above memory of a GPU and below what it sends; base model unquantised, with gradient checkpointing."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, len(plans), squeeze=False, sharey="row")
    for column, (name, found) in enumerate(plans.items()):
        options = [o for o in found.options if o.gradient_checkpointing and not o.qlora]
        places = list(dict.fromkeys(option.placement for option in options))
        for index, method in enumerate(METHODS):
            at = [position + (index - 1) * 0.27 for position in range(len(places))]
            own = [option for option in options if option.method == method]
            heights = [o.memory.total / GIB for o in own], [o.communication.total / GB for o in own]
            for panel, values in zip(panels[:, column], heights, strict=True):
                bars = panel.bar(at, values, width=0.27, color=f"C{index}", label=METHOD_NAMES[method])
                labels = [f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" for value in values]
                panel.bar_label(bars, labels, fontsize=6, padding=1)
        panels[0, column].axhline(found.settings.gpu_memory, color="black", linewidth=0.8, linestyle=":")
        panels[0, column].set_title(name)
        for panel in panels[:, column]:
            panel.set_xticks(range(len(places)), places)
            panel.margins(y=0.08)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("memory of each GPU, GiB")
    panels[1, 0].set_ylabel("sent by each GPU in a step, GB")
    panels[0, 0].annotate("an 80 GB card", (-0.4, SETTINGS.gpu_memory), (0, 3), textcoords="offset points", fontsize=8)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def page(plans: dict[str, Plan], checked: list[tuple[list[str], float]]) -> str:
    settings, made = SETTINGS, provenance()
    worst = max((deviation for _, deviation in checked), key=abs)
    header = ["", "", "checkpointing", "forward", "backward", "gradients", "own shards", "whole", "largest difference"]
    parts = [
        "# CAFT at 7B, 13B and 70B",
        "Simulated, not measured: no such GPUs were at hand. Made by `benchmarks/scale.py`; do not edit.",
        f"{settings.gpus} GPUs, on each a batch of {settings.batch_size} x {settings.tokens} tokens, "
        f"{settings.supervised:.0%} of them supervised; {settings.dtype}, n = {settings.num_auxiliary_heads + 1}, frozen heads, LoRA "
        f"r = {settings.r} on all linear maps, adapter in fp32, AdamW. Operations and tensors of a step are simulated without data "
        "(`peft-caft plan`); sizes of parameters and of what travels are counted (`peft_caft/memory.py`, "
        "`peft_caft/communication.py`, where the assumptions are). Steps of smaller models were run on a CPU, and their memory compared "
        "with what is planned ([figures](plan_check/table.md)).",
        f"{made['machine']}; {listed(made['versions'])}; commit {(made['git_commit'] or 'none')[:9]}; "
        f"{datetime.datetime.now(datetime.timezone.utc).date()}.",
        f"    {made['command']}",
        "![Memory and communication, with gradient checkpointing](scale.png)",
        "## Memory of each GPU, GiB",
        f"In brackets what does not fit an 80 GB card, of which CUDA offers {settings.gpu_memory:g} GiB; 0.5 GiB for CUDA and 5 % for "
        "the allocator are left free. DDP: one device needs as much, less the buckets of the gradients. DeepSpeed's buckets are not "
        "counted. Heads that FSDP (decoder_layer) or ZeRO-3 divides compute all tokens and keep their activations until the "
        "backward pass, with gradient checkpointing too.",
    ]
    for name, found in plans.items():
        counts = found.parameters
        parts.append(
            f"### {name}\n\nParameters, 10^9: base model {counts['base'] / 1e9:.2f}, adapter {counts['adapter'] / 1e9:.3f}, residual "
            f"heads {counts['residual_heads'] / 1e9:.2f}, decoder_layer heads {counts['decoder_layer_heads'] / 1e9:.2f}."
            f"\n\n{memory_table(found)}"
        )
    parts += [
        "## Communication: GB that each GPU sends in a step",
        "Rings; in brackets what CAFT adds to LoRA. A step is one forward and backward pass and an update. The size of the batch "
        "changes nothing here, nor does gradient checkpointing. Under ZeRO-3 it is the most that is sent, since DeepSpeed keeps "
        "what it needs again soon. No times: they would depend on the links, and on what is sent while a GPU computes.",
        communication_table(plans),
        "## FSDP2: the arithmetic against the collectives of a step",
        "Each row is a step of torch's `fully_shard`, wrapped by accelerate and run on tensors without data in a fake process group: GB "
        "that a GPU sends, were every collective a ring, parameters that it keeps, and parameters that are whole together in the "
        f"backward pass. The largest difference from the arithmetic is {worst:+.3%}. QLoRA and DeepSpeed were not run so.",
        markdown_table(header, [row for row, _ in checked]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan LoRA and CAFT at 7B, 13B and 70B.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder")
    parser.add_argument("--json", type=Path, help="also write every plan into this file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    plans = {name: planned(config) for name, config in MODELS.items()}
    checked = [result for name, config in MODELS.items() for result in compared(name, config)]
    plot(plans, arguments.output / "scale.png")
    write_text(arguments.output / "SCALE.md", page(plans, checked))
    if arguments.json:
        write_text(arguments.json, json.dumps({name: json.loads(found.to_json()) for name, found in plans.items()}))
    if any(abs(deviation) > CLAIM for _, deviation in checked):
        sys.exit(f"scale: a step differs from the arithmetic by more than {CLAIM:.0%}")


if __name__ == "__main__":
    main()
