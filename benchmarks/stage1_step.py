"""How long a step of stage 1 takes against the straightforward way, in one interleaved run.

    python benchmarks/stage1_step.py --data distilled.jsonl --output benchmarks/stage1_step

Four ways to make the same step (forward, backward, optimizer) on the same batch, in turn, so that a busy machine slows all of
them alike; what is reported are medians of the ratios within each turn:

- *full logits*: the model's own logits and those of every head at every position, and torch's cross entropy;
- *rows*: only supervised positions reach the unembedding, in chunks, and the base model computes no logits;
- *rows, soft*: the same with the base model's own distributions as targets;
- *cached*: as *rows*, with hidden states from disk in place of the base model's forward pass (every epoch but the first);
- *cached, soft*.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_caft import AuxiliaryHeads
from peft_caft.basics.files import file_sha256, write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table
from peft_caft.heads.backbone import Backbone
from peft_caft.hub.embedded_model import embedded_model
from peft_caft.training.data import collator, encode, read_jsonl
from peft_caft.training.head_trainer import HeadPretraining
from peft_caft.training.hidden_states_cache import cached_rows, with_hidden_states

DECAY = 0.8
BASELINE = "full logits"


def full_logits_loss(module: HeadPretraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The straightforward step: all logits of the base model and of every head, shifted, and torch's cross entropy."""
    backbone, labels = Backbone.of(module.base), batch["labels"]
    with torch.no_grad(), backbone.capture() as records:
        module.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    everywhere = torch.arange(labels.numel())
    total = torch.zeros(())
    for index in range(len(module.heads.heads)):
        k = index + 2
        states = module.heads.states(index, records[-1], everywhere, backbone).view(*labels.shape, -1)
        logits = torch.nn.functional.linear(states, module.base.lm_head.weight).float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-k].flatten(0, 1), labels[:, k:].flatten(), reduction="sum", ignore_index=-100
        )
        total = total + DECAY ** (k - 1) * losses
    return total / (labels[:, 1:] != -100).sum()


def main(
    data: Annotated[list[str], typer.Option(help="Data, JSONL; again for more files.")],
    output: Annotated[Path, typer.Option(help="Folder for results.")],
    model: Annotated[str | None, typer.Option(help="Base model. [default: SmolLM2-135M-Instruct]")] = None,
    turns: Annotated[int, typer.Option(help="Batches that every way steps on.")] = 15,
    batch_size: Annotated[int, typer.Option(help="Rows.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
) -> None:
    """Time all ways on the same batches, for both head types."""
    folder = model or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    collate = collator(tokenizer)
    rows = [row for path in data for row in encode(read_jsonl(path), tokenizer, max_length).rows]
    set_seed(seed)
    chosen = torch.randperm(len(rows))[: turns * batch_size].tolist()
    chosen.sort(key=lambda index: len(rows[index]["input_ids"]))
    rows = [rows[index] for index in chosen]
    with tempfile.TemporaryDirectory() as cache:
        cached = cached_rows(Path(cache), rows, base, collate, PartialState())
        results = {
            head_type: time_steps(base, head_type, rows, cached, collate, batch_size)
            for head_type in ("residual", "decoder_layer")
        }
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    record = {
        "ratios": {head_type: summary(times) for head_type, times in results.items()},
        "seconds": results,
        "batches": len(rows) // batch_size,
        "tokens": tokens,
        "supervised_share": supervised / tokens,
        "threads": torch.get_num_threads(),
        "data": {Path(path).name: file_sha256(path) for path in data},
        **provenance(),
    }
    write_text(output / "results.json", json.dumps(record, indent=2) + "\n")
    write_text(output / "table.md", table(record) + "\n")
    print(table(record))


def time_steps(
    base: Any, head_type: str, rows: list, cached: Any, collate: Any, batch_size: int
) -> dict[str, list[float]]:
    """Seconds of each step of each way."""
    modules = {
        targets: HeadPretraining(base, AuxiliaryHeads.from_base_model(base, 4, head_type).float(), DECAY, targets)
        for targets in ("hard", "soft")
    }
    optimizers = {name: torch.optim.AdamW(module.heads.parameters(), lr=1e-4) for name, module in modules.items()}
    for module in modules.values():
        module.train()
    ways = {
        BASELINE: ("hard", False),
        "rows": ("hard", False),
        "cached": ("hard", True),
        "rows, soft": ("soft", False),
        "cached, soft": ("soft", True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    starts = range(0, len(rows), batch_size)
    for turn, start in enumerate(tqdm([0, *starts], desc=f"Steps, {head_type}", unit=" turns")):
        plain = collate(rows[start : start + batch_size])
        for name, (targets, from_cache) in ways.items():
            module, optimizer = modules[targets], optimizers[targets]
            started = time.perf_counter()
            if from_cache:  # reading the disk is part of the step
                loss = module(**with_hidden_states(collate)([cached[i] for i in range(start, start + batch_size)]))[
                    "loss"
                ]
            else:
                loss = full_logits_loss(module, plain) if name == BASELINE else module(**plain)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, and quartiles, of the ratios to the straightforward way, and to the same way without a cache."""
    ratios = {name: quartiles(times[BASELINE], seconds) for name, seconds in times.items() if name != BASELINE}
    ratios["cached over rows"] = quartiles(times["rows"], times["cached"])
    ratios["cached over rows, soft"] = quartiles(times["rows, soft"], times["cached, soft"])
    return ratios


def quartiles(slow: list[float], fast: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles([s / f for s, f in zip(slow, fast, strict=True)], n=4)
    return {"median": median, "low": low, "high": high}


def table(record: dict[str, Any]) -> str:
    """How many times as fast each way is."""
    names = list(next(iter(record["ratios"].values())))
    cells = [
        [
            name,
            *(
                f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
                for r in (kind[name] for kind in record["ratios"].values())
            ),
        ]
        for name in names
    ]
    text = markdown_table(["times as fast, median (quartiles)", *record["ratios"]], cells)
    return (
        f"{text}\n\n{record['batches']} batches, {record['tokens']:,} tokens, {record['supervised_share']:.0%} supervised, "
        f"{record['threads']} threads, {record['machine']}, {listed(record['versions'])}.\n\n    {record['command']}"
    )


if __name__ == "__main__":
    typer.run(main)
