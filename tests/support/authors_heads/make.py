"""Make the files in this folder with the authors' own package, caft-llm 0.0.1: `make authors-fixtures`.

It needs transformers 4.51, so it runs in an environment of its own (requirements.txt), which that target makes. Nothing
here uses peft_caft.

For both head architectures of caft-llm, its loss and Trainer train heads on a tiny random Llama as its
``scripts/train_aux_heads.py`` does (stage 1), and its callback saves them. Then its own forward passes say what the heads
predict, in stage 1 (``caft_only_heads=True``) and, after its own loading, in stage 2 (``caft_only_heads=False``).

    base/                   the Llama
    heads_residual.pth      head_arch="linear", three heads of two blocks
    heads_decoder.pth       head_arch="transformer", three heads of one layer
    expected.safetensors    input_ids (batch, tokens), and {residual,decoder}.{stage1,stage2}: logits
                            (1 + heads, batch, tokens, vocabulary), the base model's own first
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from caft import SaveAuxiliaryHeadsCallback, add_auxiliary_heads, add_caft_loss
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

FOLDER = Path(__file__).parent
VOCABULARY = 32
# Two decoder layers in one head crash in caft-llm: a layer of this transformers returns a tuple.
HEADS = {
    "residual": {"head_arch": "linear", "caft_num_heads": 3, "caft_num_layers": 2},
    "decoder": {"head_arch": "transformer", "caft_num_heads": 3, "caft_num_layers": 1},
}


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms other than ones, so that leaving one out shows
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def counting(rows: int, length: int) -> torch.Tensor:
    """Token ids ``(rows, length)`` that count up from a random start: easy to predict, so that heads learn something."""
    return (torch.randint(VOCABULARY, (rows, 1)) + torch.arange(length)) % VOCABULARY


def train_heads(model: LlamaForCausalLM) -> Path:
    """Stage 1 of caft-llm; the file that it saved."""
    for part in (model.base_model, model.lm_head):
        part.requires_grad_(False)
    add_caft_loss(transformers, caft_heads_coefficient=1, caft_decay_coefficient=0.8, caft_only_heads=True)
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(
        folder,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=100,
    )
    rows = [{"input_ids": row, "labels": row} for row in counting(2400, 16)]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[SaveAuxiliaryHeadsCallback]).train()
    return Path(folder, "heads-epoch1.pth")


@torch.no_grad()
def logits(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids).contiguous()


def main() -> None:
    base_model().save_pretrained(FOLDER / "base")
    os.remove(FOLDER / "base" / "generation_config.json")
    torch.manual_seed(1)
    input_ids = counting(2, 12)
    input_ids[1, 6:] = torch.randint(VOCABULARY, (6,))
    expected = {"input_ids": input_ids}
    for name, arguments in HEADS.items():
        heads_file = FOLDER / f"heads_{name}.pth"
        model = base_model()
        add_auxiliary_heads(model, caft_only_heads=True, **arguments)
        saved = train_heads(model)
        shutil.copyfile(saved, heads_file)
        shutil.rmtree(saved.parent)
        expected[f"{name}.stage1"] = logits(model, input_ids)
        model = base_model()
        add_auxiliary_heads(model, caft_only_heads=False, auxiliary_heads_dir=str(heads_file), **arguments)
        expected[f"{name}.stage2"] = logits(model, input_ids)
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
