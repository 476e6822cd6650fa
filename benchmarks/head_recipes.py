"""Which heads to train, and how, at equal time: types, inputs, targets, learning rates and shares in one interleaved run.

    python benchmarks/head_recipes.py --data distilled.jsonl --data functions_train.jsonl \
        --eval-data functions_test.jsonl --output benchmarks/head_recipes --seconds 150

All arms are held in memory and take turns, a few seconds each, until each has had its time; so a busy machine slows all of
them alike. The base model's hidden states are computed once, before, and serve every arm: they cost all arms the same.
The learning rate follows the share of the time that is used up: a linear warm-up, then a cosine to zero.
Writes ``results.json``, ``table.md`` and ``accuracy.png`` into the output folder.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_caft import AuxiliaryHeads
from peft_caft.basics.files import file_sha256, replacing, write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table
from peft_caft.hub.embedded_model import embedded_model
from peft_caft.training.data import collator, encode, read_jsonl
from peft_caft.training.head_metrics import evaluate_heads
from peft_caft.training.head_trainer import HeadPretraining
from peft_caft.training.hidden_states_cache import CachedRows, cached_rows, with_hidden_states

SLICE_SECONDS = 10.0
MAX_GRAD_NORM = 1.0  # Trainer's default


@dataclass
class Arm:
    """One way to train heads, and its state."""

    head_type: str
    head_input: str
    targets: str
    learning_rate: float
    warmup: float  # share of the time
    aux_token_fraction: float
    seed: int

    def start(self, model: Any, decay: float) -> None:
        heads = AuxiliaryHeads.from_base_model(model, 4, self.head_type, self.head_input).float()
        self.parameters = sum(p.numel() for p in heads.parameters())
        self.module = HeadPretraining(model, heads, decay, self.targets, self.aux_token_fraction)
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=self.learning_rate, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.order: list[list[int]] = []
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    def train(self, rows: CachedRows, collate: Any, batch_size: int, budget: float) -> None:
        """Steps until the slice, or the whole budget, is used up."""
        started, before = time.perf_counter(), self.seconds
        self.module.train()
        while self.seconds < budget and self.seconds - before < SLICE_SECONDS:
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * max(self._factor(self.seconds / budget), 1e-3)
            batch = collate([rows[index] for index in self._next_batch(rows, batch_size)])
            self.module(**batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.module.heads.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self.tokens += int((batch["labels"] != -100).sum())
            self.seconds = before + time.perf_counter() - started

    def _factor(self, used: float) -> float:
        if used < self.warmup:
            return used / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (used - self.warmup) / (1 - self.warmup)))

    def _next_batch(self, rows: CachedRows, batch_size: int) -> list[int]:
        """Rows of about one length: random groups of 50 batches, sorted within, as Trainer's group_by_length."""
        if not self.order:
            shuffled = torch.randperm(len(rows), generator=self.generator).tolist()
            for start in range(0, len(shuffled), 50 * batch_size):
                group = sorted(shuffled[start : start + 50 * batch_size], key=lambda i: len(rows.rows[i]["input_ids"]))
                self.order += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
            shuffled = torch.randperm(len(self.order), generator=self.generator).tolist()
            self.order = [self.order[index] for index in shuffled]
        return self.order.pop()

    def result(self, model: Any, sets: dict[str, list], collate: Any) -> dict[str, Any]:
        heads = self.module.heads.to(model.dtype)
        names = (
            "head_type",
            "head_input",
            "targets",
            "learning_rate",
            "warmup",
            "aux_token_fraction",
            "seed",
            "parameters",
            "steps",
            "tokens",
            "seconds",
        )
        record: dict[str, Any] = {name: getattr(self, name) for name in names}
        record["evaluations"] = {
            name: asdict(evaluate_heads(heads, model, rows, collate, description=name)) for name, rows in sets.items()
        }
        return record


def main(
    data: Annotated[list[str], typer.Option(help="Training data, JSONL; again for more files.")],
    eval_data: Annotated[list[str], typer.Option(help="Held-out data, JSONL; again for more sets.")],
    output: Annotated[Path, typer.Option(help="Folder for results.")],
    model: Annotated[str | None, typer.Option(help="Base model. [default: SmolLM2-135M-Instruct]")] = None,
    seconds: Annotated[float, typer.Option(help="Training time of each arm.")] = 150,
    head_type: Annotated[str, typer.Option(help="With commas.")] = "residual,decoder_layer",
    head_input: Annotated[str, typer.Option(help="With commas.")] = "last_layer_input,last_hidden_state",
    targets: Annotated[str, typer.Option(help="With commas.")] = "hard,soft",
    learning_rate: Annotated[str, typer.Option(help="With commas.")] = "1e-3",
    warmup: Annotated[str, typer.Option(help="Shares of the time, with commas.")] = "0.05",
    aux_token_fraction: Annotated[str, typer.Option(help="Shares of the positions, with commas.")] = "1",
    seed: Annotated[str, typer.Option(help="With commas.")] = "0",
    batch_size: Annotated[int, typer.Option(help="Rows.")] = 8,
    max_rows: Annotated[int | None, typer.Option(help="Rows of each training file.")] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows of each held-out set.")] = 100,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    cache: Annotated[Path, typer.Option(help="Folder for hidden states.")] = Path("head-recipes-cache"),
    aux_loss_decay: Annotated[float, typer.Option(help="alpha")] = 0.8,
) -> None:
    """Train every combination of the options for the same time and compare them on held-out data."""
    folder = model or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    collate = collator(tokenizer)
    rows = [row for path in data for row in encode(read_jsonl(path, max_rows), tokenizer, max_length).rows]
    sets = {Path(p).stem: encode(read_jsonl(p, eval_rows), tokenizer, max_length).rows for p in eval_data}
    cached = cached_rows(cache, rows, base, collate, PartialState())
    options = (head_type, head_input, targets, learning_rate, warmup, aux_token_fraction, seed)
    combinations = itertools.product(*(option.split(",") for option in options))
    arms = [Arm(t, i, g, float(r), float(w), float(p), int(s)) for t, i, g, r, w, p, s in combinations]
    set_seed(0)
    for arm in arms:
        arm.start(base, aux_loss_decay)
    bar = tqdm(total=len(arms) * seconds, desc=f"Training {len(arms)} arms in turn", unit=" s", unit_scale=True)
    while any(arm.seconds < seconds for arm in arms):
        for arm in arms:
            before = arm.seconds
            arm.train(cached, with_hidden_states(collate), batch_size, seconds)
            bar.update(arm.seconds - before)
    bar.close()
    results = {
        "arms": [arm.result(base, sets, collate) for arm in arms],
        "seconds": seconds,
        "rows": len(rows),
        "batch_size": batch_size,
        "max_length": max_length,
        "threads": torch.get_num_threads(),
        "data": {Path(path).name: file_sha256(path) for path in [*data, *eval_data]},
        **provenance(),
    }
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(output / "table.md", table(results) + "\n")
    plot(results, output / "accuracy.png")
    print(table(results))


def plot(results: dict[str, Any], path: Path) -> None:
    """Cross entropy and top-1 accuracy over the tokens ahead: a row of panels per held-out set, a line per arm."""
    sets = list(results["arms"][0]["evaluations"])
    figure = Figure(figsize=(10, 3.6 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 2, squeeze=False)
    for name, (left, right) in zip(sets, panels, strict=True):
        for index, arm in enumerate(results["arms"]):
            heads = arm["evaluations"][name]["heads"]
            ahead = [head["tokens_ahead"] for head in heads]
            style = {"color": f"C{index // 2}", "linestyle": ("-", "--")[index % 2], "marker": "o", "markersize": 4}
            left.plot(ahead, [head["cross_entropy"] for head in heads], label=label(arm), **style)
            right.plot(ahead, [head["top1"] for head in heads], **style)
        left.set(title=f"{name}: cross entropy (nats/token)", xlabel="tokens ahead", xticks=ahead)
        right.set(title=f"{name}: top-1 accuracy", xlabel="tokens ahead", xticks=ahead)
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def label(arm: dict[str, Any]) -> str:
    return f"{arm['head_type']}, {arm['head_input']}, {arm['targets']}, {arm['learning_rate']:g}, {arm['warmup']:.0%} warm-up{share(arm)}"


def share(arm: dict[str, Any]) -> str:
    """How many of the positions teach at a step, unless all do, as in results of before there was a choice."""
    fraction = arm.get("aux_token_fraction", 1)
    return "" if fraction == 1 else f", {fraction:.0%} of the positions"


def table(results: dict[str, Any]) -> str:
    """One row per arm and held-out set, and below it how it was made."""
    lines = []
    for name in results["arms"][0]["evaluations"]:
        for arm in results["arms"]:
            evaluation = arm["evaluations"][name]
            heads = evaluation["heads"]
            lines.append(
                [
                    name,
                    f"{arm['head_type']}, {arm['head_input']}, {arm['targets']}{share(arm)}",
                    f"{arm['learning_rate']:g}, {arm['warmup']:.0%}",
                    str(arm["seed"]),
                    str(arm["steps"]),
                    " / ".join(f"{head['cross_entropy']:.2f}" for head in heads),
                    " / ".join(f"{head['top1']:.1%}".rstrip("%") for head in heads),
                    f"{evaluation['acceptance_length']:.2f}",
                ]
            )
    header = [
        "held-out set",
        "arm",
        "learning rate, warm-up",
        "seed",
        "steps",
        "cross entropy, k = 2 ... 5",
        "top-1 (%)",
        "accepted",
    ]
    return (
        f"{markdown_table(header, lines)}\n\n{results['seconds']:g} s of training each, in turn; {results['rows']:,} rows of at "
        f"most {results['max_length']} tokens, {results['batch_size']} a step. {results['machine']}, {results['threads']} "
        f"threads, {listed(results['versions'])}, commit {results['git_commit'][:12]}.\n\n    {results['command']}"
    )


if __name__ == "__main__":
    typer.run(main)
