"""How much noise `aux_token_fraction` adds to the gradient, beside the noise that minibatches have anyway.

    python benchmarks/sampling_noise.py

SmolLM2-135M with its published heads reads source code of Python's standard library, a batch at a time. For every batch the
gradient of all LoRA weights is computed with all positions, and with several draws of a share p of them. Written to
``sampling_noise/table.md`` beside this file, for each p and beta:

    noise = mean over draws ||g_drawn - g_all||^2  /  mean over batches ||g_all - mean g_all||^2

A value of 0.01 means that sampling adds to the variance of the gradient what one batch in a hundred less would.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_caft import CAFTConfig
from peft_caft.basics.files import write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table
from peft_caft.hub.embedded_model import embedded_model

HERE = Path(__file__).parent
HEADS = HERE.parent / "model_cards" / "SmolLM2-135M-Instruct-caft-heads"
FRACTIONS, BETAS = (0.5, 0.25, 0.1), (0.01, 0.1, 1.0)


def batches(tokenizer: object, count: int, rows: int, tokens: int) -> list[torch.Tensor]:
    """Token ids ``(rows, tokens)``: from as many modules as there are rows, none of which is read twice."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids = tokenizer(file.read_text(errors="ignore"))["input_ids"]
        if len(ids) >= 2 * tokens:
            found.append(torch.tensor(ids[tokens : 2 * tokens]))  # past the licence and the imports
        if len(found) == count * rows:
            break
    return list(torch.stack(found).view(count, rows, tokens))


def gradient(model: torch.nn.Module, ids: torch.Tensor, fraction: float, draw: int, auxiliary: bool) -> torch.Tensor:
    """Of all LoRA weights in one vector; ``auxiliary`` False leaves only the next-token loss."""
    model.peft_config["default"].aux_token_fraction = fraction
    model.base_model.set_training_progress(draw, 10**6)  # another seed of the draw; the schedule is constant
    model.zero_grad()
    with model.auxiliary_loss_enabled(auxiliary):
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def measure(count: int, draws: int, rows: int, tokens: int) -> dict[str, dict[str, float]]:
    """Noise for every p and beta."""
    folder = embedded_model()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = CAFTConfig(
        heads=str(HEADS), target_modules="all-linear", aux_loss_weight=1.0, aux_loss_schedule="constant"
    )
    model = get_peft_model(base, config).train()
    data = batches(AutoTokenizer.from_pretrained(folder), count, rows, tokens)
    own, auxiliary, errors = [], [], {p: [] for p in FRACTIONS}
    for number, ids in enumerate(tqdm(data, desc="Gradients", unit=" batches")):
        own.append(gradient(model, ids, 1.0, 0, auxiliary=False))
        auxiliary.append(gradient(model, ids, 1.0, 0, auxiliary=True) - own[-1])
        for p in FRACTIONS:
            for draw in range(draws):
                drawn = gradient(model, ids, p, 1 + number * draws + draw, auxiliary=True) - own[-1]
                errors[p].append(float((drawn - auxiliary[-1]).square().sum()))
    result: dict[str, dict[str, float]] = {}
    for beta in BETAS:
        total = torch.stack([o + beta * a for o, a in zip(own, auxiliary, strict=True)])
        minibatch = float((total - total.mean(dim=0)).square().sum()) / (len(total) - 1)
        result[f"{beta:g}"] = {f"{p:g}": beta**2 * sum(e) / len(e) / minibatch for p, e in errors.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the noise of sampled positions with that of minibatches.")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2, help="of positions, for each batch and p")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--output", type=Path, default=HERE / "sampling_noise", help="folder")
    arguments = parser.parse_args()
    noise = measure(arguments.batches, arguments.draws, arguments.rows, arguments.tokens)
    record = {"noise": noise, "arguments": {k: v for k, v in vars(arguments).items() if k != "output"}, **provenance()}
    rows = [[beta, *(f"{noise[beta][f'{p:g}']:.2g}" for p in FRACTIONS)] for beta in noise]
    text = (
        markdown_table(["beta", *(f"p = {p:g}" for p in FRACTIONS)], rows)
        + f"\n\nVariance that the draw adds to the gradient, over that between minibatches of {arguments.rows} x "
        f"{arguments.tokens} tokens; {arguments.batches} batches, {arguments.draws} draws each, gamma = 1. SmolLM2-135M with its "
        f"published decoder-layer heads on source code, LoRA r = 8 before its first step. "
        f"{record['machine']}; {listed(record['versions'])}; commit {(record['git_commit'] or 'none')[:9]}.\n\n"
        f"    {record['command']}"
    )
    write_text(arguments.output / "results.json", json.dumps(record, indent=2) + "\n")
    write_text(arguments.output / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
