"""The least that CAFT can cost over LoRA, counted in operations from the models' shapes; nothing is run.

    python benchmarks/flops.py

writes ``flops/table.md`` and ``flops/limit.png`` beside this file. The count is `peft_caft.planning.flops`; n = 5.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig

from peft_caft.basics.files import replacing, write_text
from peft_caft.basics.tables import markdown_table
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.planning.flops import ModelShapes, caft_step, lora_step

TOKENS = 512  # of a row; a query meets half of them on average
SUPERVISED = (1.0, 0.7, 0.5, 0.3)
CLAIM = 0.078  # what the field says that CAFT costs in time
RANK = 8


def llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )


# As the config.json of each model's repository has them.
MODELS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": llama(49_152, 576, 1536, 30, 9, 3),
    "Gemma 3 270M": Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "Llama-2 7B": llama(32_000, 4096, 11_008, 32, 32, 32),
    "Llama-2 13B": llama(32_000, 5120, 13_824, 40, 40, 40),
    "Llama-3.1 8B": llama(128_256, 4096, 14_336, 32, 32, 8),
    "Llama-3.1 70B": llama(128_256, 8192, 28_672, 80, 64, 8),
}


def shapes_of(config: PretrainedConfig) -> ModelShapes:
    """Of the model with LoRA on every linear map, on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
        return ModelShapes.of(get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")))


def overhead(
    shapes: ModelShapes, head_type: str, supervised: float, fraction: float = 1.0, skipping: bool = False
) -> float:
    """Operations of CAFT over those of LoRA, minus 1; ``skipping``: LoRA too computes supervised logits alone."""
    lora = lora_step(shapes, TOKENS / 2, supervised if skipping else 1.0)
    caft = caft_step(shapes, TOKENS / 2, head_type, supervised=supervised, aux_token_fraction=fraction)
    return caft.total / lora.total - 1


def table(models: dict[str, ModelShapes]) -> str:
    def row(name: str, head_type: str) -> list[str]:
        shapes = models[name]
        values = [overhead(shapes, head_type, s) for s in SUPERVISED]
        values += [overhead(shapes, head_type, 0.5, 0.25), overhead(shapes, head_type, 0.5, skipping=True)]
        values += [overhead(shapes, head_type, 0.5, 0.25, skipping=True)]
        return [name, head_type, *(f"{value:+.1%}" for value in values)]

    columns = [
        "model",
        "head",
        *(f"s = {s:g}" for s in SUPERVISED),
        "s = .5, p = .25",
        "skip, s = .5",
        "skip, p = .25",
    ]
    return (
        markdown_table(columns, [row(name, head_type) for name in models for head_type in HEAD_TYPES])
        + f"\n\nOperations of a CAFT step (n = 5, frozen heads, LoRA of rank {RANK} on all linear maps, rows of {TOKENS} tokens, no "
        "gradient checkpointing) over those of a LoRA step with the loss of transformers, which computes the logits of all "
        "tokens. s: share of the tokens with a label, p: `aux_token_fraction`. Last columns: over a LoRA step that leaves out "
        "the logits of tokens without a label too, the honest yardstick."
    )


def plot(models: dict[str, ModelShapes], path: Path) -> None:
    """Cost over s, for each model and head; solid with all supervised positions, dashed with a quarter of them."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shares = [i / 40 for i in range(4, 41)]
    for panel, head_type in zip(panels, HEAD_TYPES, strict=True):
        for index, (name, shapes) in enumerate(models.items()):
            for fraction, style in ((1.0, "-"), (0.25, "--")):
                costs = [overhead(shapes, head_type, s, fraction) for s in shares]
                panel.plot(shares, costs, style, color=f"C{index}", label=name if fraction == 1 else None)
        panel.axhline(CLAIM, color="black", linewidth=0.8, linestyle=":")
        panel.annotate("+7.8 %, the claim", (0.1, CLAIM), (0, 3), textcoords="offset points", fontsize=8)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=head_type.replace("_", " "), xlabel="share of supervised tokens, s", ylim=(-0.5, 1.0))
        panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panels[0].set_ylabel("operations over a LoRA step")
    panels[0].plot([], [], "--", color="black", label="p = 0.25")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the least that CAFT can cost over LoRA.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "flops", help="folder")
    folder = parser.parse_args().output
    models = {name: shapes_of(config) for name, config in MODELS.items()}
    write_text(folder / "table.md", table(models) + "\n")
    plot(models, folder / "limit.png")
    print(table(models))


if __name__ == "__main__":
    main()
