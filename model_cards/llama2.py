"""Write the model cards of CAFT-Llama2 7B and 13B, heads and adapter each, whose weights are not trained yet.

    python model_cards/llama2.py

writes ``CAFT-Llama2-{7B,13B}-heads/README.md`` and ``CAFT-Llama2-{7B,13B}/README.md`` beside this file. Every figure is
computed here: shapes and counts from the model's real configuration on the meta device, memory and operations from those.
Once weights are trained, ``peft-caft push`` writes a card with what was measured in place of these.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.basics.files import write_text
from peft_caft.basics.tables import markdown_table
from peft_caft.heads.card import PAPER, front_matter

NOT_TRAINED = "> **Not trained yet.** There are no weights here and no figure below was measured: {what}"
ORG = "ORG"  # whoever trains them
PROMPTS, ANSWER_TOKENS, ROW_TOKENS = 15_000, 512, 1024  # of stage 1
PEAK_FLOPS = 989e12  # dense bf16 of one NVIDIA H100 SXM, by its data sheet
# fp32 weight and gradient, and the two fp32 moments of AdamW; the frozen base model and frozen heads are kept in bf16.
TRAINED_BYTES, FROZEN_BYTES = 16, 2
LORA = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Size:
    """One Llama 2, as the ``config.json`` of its repository describes it."""

    name: str
    base: str
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int

    @property
    def heads(self) -> str:
        return f"CAFT-Llama2-{self.name}-heads"

    @property
    def adapter(self) -> str:
        return f"CAFT-Llama2-{self.name}"

    def model(self) -> LlamaForCausalLM:
        """The model without numbers, on the meta device."""
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.attention_heads,
            num_key_value_heads=self.attention_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        )
        with torch.device("meta"):
            return LlamaForCausalLM(config)


SIZES = (
    Size("7B", "meta-llama/Llama-2-7b-hf", 4096, 11_008, 32, 32),
    Size("13B", "meta-llama/Llama-2-13b-hf", 5120, 13_824, 40, 40),
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def heads_card(size: Size) -> str:
    """The card of the heads of one size."""
    model = size.model()
    heads = AuxiliaryHeads.from_base_model(model)
    first = {name: p for name, p in heads.named_parameters() if name.startswith("heads.0.")}
    total, each = parameters(heads), parameters(heads.heads[0])
    tokens = PROMPTS * ANSWER_TOKENS
    lm_head = parameters(model.lm_head)
    # Two operations a parameter and token forward, and as many again for each of the two gradients of a trained layer;
    # the frozen unembedding needs one gradient. The scores of the attention are left out.
    trunk = 2 * parameters(model.model.layers)
    per_token = trunk + 2 * lm_head + 6 * total + len(heads.heads) * 4 * lm_head
    flops = tokens * (trunk + 2 * lm_head) + tokens * per_token
    memory = [
        ["base model, frozen, bf16", gib(parameters(model) * FROZEN_BYTES)],
        ["heads in training: fp32 weight and gradient, two AdamW moments", gib(total * TRAINED_BYTES)],
        ["together, activations of the batch apart", gib(parameters(model) * FROZEN_BYTES + total * TRAINED_BYTES)],
        ["heads in stage 2 and on disk, bf16", gib(total * FROZEN_BYTES)],
        [
            f"with `--cache`, on disk, {tokens / 1e6:.1f} M tokens at most",
            gib(tokens * size.hidden_size * FROZEN_BYTES),
        ],
    ]
    lines = [
        front_matter(
            "peft-caft",
            "llama2",
            ["caft", "auxiliary-heads", "multi-token-prediction", "not-trained-yet"],
            base_model=size.base,
            base_model_relation="adapter",
        ),
        f"# {size.heads}",
        "",
        NOT_TRAINED.format(
            what="shapes, counts, memory and operations are computed from the model's configuration. What it takes to train "
            "them stands under [What it takes](#what-it-takes)."
        ),
        "",
        f"{len(heads.heads)} auxiliary heads for `{size.base}` that predict the tokens 2 to {len(heads.heads) + 1} ahead, for "
        f"concept-aware fine-tuning ({PAPER}) with `peft-caft`. They are to add a multi-token loss while an adapter is trained "
        "and are dropped afterwards. Adapters trained with them are repositories of their own, such as "
        f"`{ORG}/{size.adapter}`.",
        "",
        "## Shapes",
        "",
        f"Each head is a decoder layer of the base model's kind on the input of the last layer; the final norm and the "
        f"unembedding are the base model's own and not part of the files. {len(heads.heads)} heads of {each:,} parameters, "
        f"{total:,} in all, {total / parameters(model):.1%} of the base model's {parameters(model):,}.",
        "",
        markdown_table(
            ["tensor of the first head", "shape", "parameters"],
            [[name, " x ".join(f"{n:,}" for n in p.shape), f"{p.numel():,}"] for name, p in first.items()],
        ),
        "",
        "## What it takes",
        "",
        markdown_table(["memory", ""], memory),
        "",
        f"{PROMPTS:,} answers of at most {ANSWER_TOKENS} tokens, read once: {flops / 1e15:,.0f} PFLOP at most, attention scores "
        f"and prompts left out, of which {per_token / 1e9:.1f} GFLOP a token in training. At the peak of an H100 SXM "
        f"({PEAK_FLOPS / 1e12:.0f} TFLOP/s, which no run reaches) that is {flops / PEAK_FLOPS / 60:.0f} minutes; the base model "
        "generates far below it.",
        "",
        "```bash",
        *heads_commands(size),
        "```",
        "",
        "The prompts are a public instruction data set; the answers are the base model's own, so that the heads learn its own "
        f"distribution. The base model is under the Llama 2 licence, and `{size.base}` asks for its acceptance before a "
        "download.",
        "",
        "## Use, once they are trained",
        "",
        "```python",
        f'base = AutoModelForCausalLM.from_pretrained("{size.base}", dtype="bfloat16")',
        f'model = get_peft_model(base, CAFTConfig(heads="{ORG}/{size.heads}", target_modules="all-linear"))',
        "```",
    ]
    return "\n".join(lines) + "\n"


def heads_commands(size: Size) -> list[str]:
    """Stage 1, from prompts to the Hub."""
    folder = size.heads
    return [
        "pip install '.[datasets]'  # in a checkout of peft-caft",
        f"peft-caft distill --model {size.base} --dtype bfloat16 --prompts hf:databricks/databricks-dolly-15k \\",
        f"    --column instruction --max-prompts {PROMPTS} --max-new-tokens {ANSWER_TOKENS} --batch-size 64 \\",
        "    --output answers.jsonl",
        f"peft-caft train-heads --model {size.base} --dtype bfloat16 --data answers.jsonl --license llama2 \\",
        f"    --max-length {ROW_TOKENS} --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --output {folder}",
        f"peft-caft inspect {folder} --model {size.base}",
        f"peft-caft push {folder} {ORG}/{folder}",
    ]


def adapter_card(size: Size) -> str:
    """The card of the adapter of one size."""
    model = size.model()
    base = parameters(model)
    heads = parameters(AuxiliaryHeads.from_base_model(model))
    adapter = sum(
        p.numel() for p in get_peft_model(model, LORA, low_cpu_mem_usage=True).parameters() if p.requires_grad
    )
    shapes = {
        name: (layer.in_features, layer.out_features)
        for name, layer in size.model().model.layers[0].named_modules()
        if isinstance(layer, nn.Linear)
    }
    memory = [
        ["base model, frozen, bf16", gib(base * FROZEN_BYTES)],
        ["auxiliary heads, frozen, bf16", gib(heads * FROZEN_BYTES)],
        ["adapter in training: fp32 weight and gradient, two AdamW moments", gib(adapter * TRAINED_BYTES)],
        [
            "together, activations of the batch apart",
            gib((base + heads) * FROZEN_BYTES + adapter * TRAINED_BYTES),
        ],
        ["adapter on disk, fp32", gib(adapter * 4)],
    ]
    lines = [
        front_matter(
            "peft", "llama2", ["caft", "lora", "not-trained-yet"], base_model=size.base, base_model_relation="adapter"
        ),
        f"# {size.adapter}",
        "",
        NOT_TRAINED.format(
            what="shapes, counts and memory are computed from the model's configuration. What it takes to train it stands under "
            "[What it takes](#what-it-takes)."
        ),
        "",
        f"A LoRA adapter for `{size.base}`, to be trained by concept-aware fine-tuning ({PAPER}) with `peft-caft` on names of "
        f"molecules and their SMILES, with the auxiliary heads `{ORG}/{size.heads}`. Once trained it is an ordinary LoRA "
        "adapter, which plain PEFT loads; the heads are not needed to run it.",
        "",
        "## Shapes",
        "",
        f"Rank {LORA.r}, alpha {LORA.lora_alpha}, dropout {LORA.lora_dropout:g}, on all seven linear layers of each of "
        f"{size.layers} decoder layers: {adapter:,} parameters, {adapter / base:.2%} of the base model's {base:,}.",
        "",
        markdown_table(
            ["linear layer", "A", "B", "parameters"],
            [
                [name, f"{LORA.r} x {i:,}", f"{o:,} x {LORA.r}", f"{LORA.r * (i + o):,}"]
                for name, (i, o) in shapes.items()
            ],
        ),
        "",
        "## What it takes",
        "",
        markdown_table(["memory", ""], memory),
        "",
        "```bash",
        *adapter_commands(size),
        "```",
        "",
        "LoRA and optimiser settings are those that the paper's authors published for their own adapters. The control is the "
        "same command with `--method lora` and another `--output`: it shares seed and order of data. Nothing is known yet of "
        "how the two compare at this size.",
        "",
        f"The base model is under the Llama 2 licence, and `{size.base}` asks for its acceptance before a download.",
    ]
    return "\n".join(lines) + "\n"


def adapter_commands(size: Size) -> list[str]:
    """Stage 2, from data to the Hub."""
    folder, defaults = size.adapter, CAFTConfig()
    loss = f"--aux-loss-weight {defaults.aux_loss_weight:g} --aux-loss-decay {defaults.aux_loss_decay:g}"
    return [
        "pip install '.[demo]'  # in a checkout of peft-caft",
        "python -c \"from peft_caft.demo.molecules import completion, write_dataset; write_dataset('molecules', row=completion)\"",
        f"peft-caft train --model {size.base} --dtype bfloat16 --heads {ORG}/{size.heads} \\",
        f"    --data molecules/train.jsonl --eval-data molecules/dev.jsonl --max-length 512 {loss} \\",
        f"    --r {LORA.r} --lora-alpha {LORA.lora_alpha} --lora-dropout {LORA.lora_dropout:g} --target-modules all-linear \\",
        "    --learning_rate 1e-5 --warmup_steps 50 --num_train_epochs 5 --per_device_train_batch_size 8 \\",
        f"    --gradient_accumulation_steps 4 --gradient_checkpointing true --output {folder}",
        f"peft-caft inspect {folder} --model {size.base}",
        f"peft-caft push {folder} {ORG}/{folder}",
    ]


def cards() -> dict[str, str]:
    """Folder name -> card."""
    return {size.heads: heads_card(size) for size in SIZES} | {size.adapter: adapter_card(size) for size in SIZES}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the cards of CAFT-Llama2.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to write them")
    folder = parser.parse_args().folder
    for name, card in cards().items():
        write_text(folder / name / "README.md", card)
        print(folder / name / "README.md")


if __name__ == "__main__":
    main()
