"""``peft-caft evaluate``: what a model answers to the rows of a task, and how good that is, row by
row.

The folder gets ``rows.jsonl`` (one line per row, in the order of the data: answer, scores, the
cross entropy of each token of the reference), ``evaluation.json`` (means with confidence intervals,
settings, provenance) and ``evaluation.md``. An interrupted run is taken up where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..basics.files import file_sha256, full_disk_explained, replacing, write_text
from ..basics.parts import Parts
from ..basics.provenance import git_commit, peak_memory_mib, provenance, source_name, weights_digest
from ..training.data import read_jsonl, require_tokenizer_of
from ..training.generation import Sampling, TransformersBackend, stop_token_ids
from .evaluator import Evaluator
from .reference_losses import PromptAndAnswer, encode_answers
from .report import markdown_report, metrics_of, summarise
from .settings import EvaluationSettings
from .task import Row, Task, load_task


class EvaluationParts(Parts):
    """What is finished so far of an evaluation, whose record has a name of its own."""

    @property
    def provenance_path(self) -> Path:
        return self.output.with_name("evaluation.json")


def evaluate(settings: EvaluationSettings, overwrite: bool = False) -> dict[str, Any]:
    """Let a model answer the rows of a task and score it; an interrupted run goes on.

    The result does not depend on interruptions; it does a little on ``batch_size``, since padding
    changes the rounding.

    Returns:
        the contents of ``evaluation.json``.

    Raises:
        FileExistsError, FileNotFoundError, ModuleNotFoundError, TypeError, ValueError, OSError: as
            the message says.
    """
    for name in ("batch_size", "max_rows", "max_new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1.")
    git_commit()  # remembered for the provenance
    disable_progress_bar()
    task = load_task(settings.task)
    metrics_of(task)  # refuses a name that is taken, before any work
    rows = read_jsonl(settings.data, settings.max_rows)
    base = base_model_of(settings.model, settings.adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    sampling = _sampling(settings, task, base, tokenizer)
    encoded = encode_answers(rows, tokenizer, sampling.stop_token_ids)
    model = load_model(base, settings.adapter, settings.dtype)
    _require_room(encoded, model, sampling.max_new_tokens)
    require_tokenizer_of(model, tokenizer)
    recorded = asdict(settings) | {
        "task": task.name,
        "task_sha256": file_sha256(settings.task),
        "model": source_name(base),
        "adapter": settings.adapter and source_name(settings.adapter),
        "weights_sha256": weights_digest(model),
        "data": Path(settings.data).name,
        "data_sha256": file_sha256(settings.data),
        "tokens_sha256": hashlib.sha256(json.dumps([e.ids for e in encoded]).encode()).hexdigest(),
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": sampling.stop_token_ids,
    }
    del recorded["output"]
    parts = EvaluationParts(Path(settings.output) / "rows.jsonl")
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(parts.output, "All batches that were finished are"):
        if done := parts.begin(recorded, overwrite):
            return done
        pad_token_id = sampling.stop_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        backend = TransformersBackend(model, sampling, settings.batch_size, pad_token_id)
        _answer(Evaluator(task, tokenizer, backend, settings.answers), rows, encoded, parts, settings.seed)
        results = _join(parts)
        finished = list(parts.finished())
        record = summarise(task, rows, results) | {
            "generated_tokens": sum(r["generated_tokens"] for r in results),
            "seconds": round(sum(batch["seconds"] for batch in finished), 1),
            "peak_memory_mib": peak_memory_mib(),
            "settings": recorded,
            **provenance(),
        }
        write_text(parts.output.with_name("evaluation.md"), markdown_report(record, task, rows, results))
        write_text(parts.provenance_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        parts.discard()
    return record


def base_model_of(model: str | None, adapter: str | None) -> str:
    """The base model to load: the given one, or the one that the adapter names.

    Raises:
        FileNotFoundError: if the adapter is a folder without adapter.
        ValueError: if neither says.
    """
    if model is not None:
        return model
    if adapter is None:
        raise ValueError("model: got neither --model nor --adapter, expected a model, an adapter, or both.")
    config = Path(adapter, "adapter_config.json")
    if not config.is_file():
        raise FileNotFoundError(
            f"adapter: no adapter_config.json in {adapter!r}, expected a folder that `peft-caft train` or save_pretrained wrote. (An adapter "
            "on the Hub needs --model.)"
        )
    named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"model: {config} names no base model, expected one. Pass --model.")
    return named


def load_model(base: str, adapter: str | None, dtype: str) -> nn.Module:
    """A base model, with its adapter as plain PEFT loads it, ready to evaluate on the GPU if there
    is one.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _sampling(settings: EvaluationSettings, task: Task, base: str, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    try:
        generation_config = GenerationConfig.from_pretrained(base)
    except OSError:  # a model need not have one
        generation_config = None
    stops = stop_token_ids(tokenizer, generation_config)
    return Sampling(settings.temperature, 1.0, 0, settings.max_new_tokens or task.max_new_tokens, stops)


def _require_room(encoded: list[PromptAndAnswer], model: nn.Module, max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(encoded, start=1):
        needed = max(len(row.prompt) + max_new_tokens, len(row.ids))
        if context is not None and needed > context:
            raise ValueError(
                f"row {number}: its prompt of {len(row.prompt):,} tokens and an answer of up to {needed - len(row.prompt):,} are longer than "
                f"the model's context, expected at most {context:,}. Lower --max-new-tokens, or leave the row out."
            )


def _answer(evaluator: Evaluator, rows: list[Row], encoded: list[PromptAndAnswer], parts: Parts, seed: int) -> None:
    """Answer and score in batches of about equal length, the longest first, so that too little
    memory shows at once.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(encoded[index].ids), index))
    size = evaluator.backend.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    finished = {batch["batch"] for batch in parts.finished()}
    done = sum(len(batches[number]) for number in finished)
    # Every other one, then the rest: batches of all lengths early, so that the estimated time is
    # honest.
    turns = [*range(0, len(batches), 2), *range(1, len(batches), 2)]
    tokens, started = 0, time.perf_counter()
    with (
        tqdm(total=len(rows), initial=done, desc="Evaluating", unit=" rows", smoothing=0) as bar,
        parts.appending(0) as append,
    ):
        for number in (turn for turn in turns if turn not in finished):
            begun, batch = time.perf_counter(), batches[number]
            own = evaluator.results(
                [rows[index] for index in batch], [encoded[index] for index in batch], seed * 1_000_003 + number * 4099
            )
            results = [{"row": index} | result for index, result in zip(batch, own, strict=True)]
            append({"batch": number, "seconds": round(time.perf_counter() - begun, 3), "results": results})
            tokens += sum(result["generated_tokens"] for result in own)
            if evaluator.generates:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            bar.update(len(batch))


def _join(parts: Parts) -> list[dict[str, Any]]:
    """Write ``rows.jsonl`` in the order of the data."""
    results = sorted((r for batch in parts.finished() for r in batch["results"]), key=lambda r: r["row"])
    with replacing(parts.output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    return results
