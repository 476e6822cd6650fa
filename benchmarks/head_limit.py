"""How well a head could predict the token after the next if it knew all that the base model knows: a limit for soft targets.

    python benchmarks/head_limit.py --data functions_test.jsonl --output benchmarks/head_limit

The base model's own distribution of token t+2 given the tokens up to t is the sum over x of p(x) p(t+2 | ..., x), here over its
most likely ``--branches`` tokens x at t+1, in one forward pass a row: all branches follow the row in one sequence, and the
attention mask lets each see the row up to its position alone. Its most likely token is compared with the text. A head trained
on soft targets approaches this distribution and, on average, cannot beat what is left of the sum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_caft.basics.files import file_sha256, write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table
from peft_caft.hub.embedded_model import embedded_model
from peft_caft.training.data import encode, read_jsonl


@torch.no_grad()
def second_token(model: PreTrainedModel, input_ids: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """The model's next-token logits, and its probabilities for the token after the next.

    Args:
        model: of a kind that takes a mask ``(batch, 1, tokens, tokens)``.
        input_ids: int64 ``(tokens,)``.
        branches: how many next tokens to follow.

    Returns:
        both fp32 ``(tokens, vocabulary)``; the second sums to the share of the probability that was followed.
    """
    tokens = len(input_ids)
    logits = model(input_ids[None], use_cache=False).logits[0].float()
    followed = logits.softmax(dim=1).topk(branches, dim=1)
    ids = torch.cat([input_ids, followed.indices.flatten()])
    positions = torch.cat([torch.arange(tokens), torch.arange(1, tokens + 1).repeat_interleave(branches)])
    seen = torch.eye(len(ids), dtype=torch.bool)
    before = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen[:tokens, :tokens] = before
    seen[tokens:, :tokens] = before.repeat_interleave(branches, dim=0)
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    states = model.model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
    ).last_hidden_state[0, tokens:]
    second = torch.zeros_like(logits)
    for branch in range(branches):
        probabilities = model.lm_head(states[branch::branches]).float().softmax(dim=1)
        second += probabilities * followed.values[:, branch, None]
    return logits, second


def main(
    data: Annotated[list[str], typer.Option(help="Held-out data, JSONL; again for more sets.")],
    output: Annotated[Path, typer.Option(help="Folder for results.")],
    rows: Annotated[int, typer.Option(help="Rows of each set.")] = 32,
    branches: Annotated[int, typer.Option(help="Next tokens to follow at each position.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 160,
    model: Annotated[str | None, typer.Option(help="Base model. [default: SmolLM2-135M-Instruct]")] = None,
) -> None:
    """Measure the limit and write ``results.json`` and ``table.md``."""
    folder = model or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    sets = {}
    for path in data:
        totals = torch.zeros(5)
        for row in tqdm(
            encode(read_jsonl(path, rows), tokenizer, max_length).rows, desc=Path(path).stem, unit=" rows"
        ):
            input_ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            logits, second = second_token(base, input_ids, branches)
            has_next, has_second = labels[1:] != -100, labels[2:] != -100
            totals += torch.tensor(
                [
                    (logits[:-1].argmax(dim=1) == labels[1:])[has_next].sum(),
                    has_next.sum(),
                    (second[:-2].argmax(dim=1) == labels[2:])[has_second].sum(),
                    has_second.sum(),
                    second[:-2].sum(dim=1)[has_second].sum(),
                ]
            )
        sets[Path(path).stem] = {
            "next_top1": float(totals[0] / totals[1]),
            "second_top1": float(totals[2] / totals[3]),
            "targets": int(totals[3]),
            "followed": float(totals[4] / totals[3]),
        }
    results = {
        "sets": sets,
        "rows": rows,
        "branches": branches,
        "max_length": max_length,
        "data": {Path(path).name: file_sha256(path) for path in data},
        **provenance(),
    }
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(output / "table.md", table(results) + "\n")
    print(table(results))


def table(results: dict) -> str:
    """One row per set, and below it how it was made."""
    columns = ["held-out set", "top-1, next token", "top-1, the one after", "targets", "probability followed"]
    lines = [
        [
            name,
            f"{values['next_top1']:.1%}",
            f"{values['second_top1']:.1%}",
            f"{values['targets']:,}",
            f"{values['followed']:.0%}",
        ]
        for name, values in results["sets"].items()
    ]
    return (
        f"{markdown_table(columns, lines)}\n\nThe base model itself, its {results['branches']} most likely next tokens followed; the "
        f"first {results['rows']} rows, of at most {results['max_length']} tokens. {listed(results['versions'])}, commit "
        f"{results['git_commit'][:12]}.\n\n    {results['command']}"
    )


if __name__ == "__main__":
    typer.run(main)
