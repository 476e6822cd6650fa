"""``peft-caft evaluate``: lets a model answer the rows of a task and scores each answer.

It writes ``rows.jsonl`` (answer, scores and cross entropies of a row), ``evaluation.json`` (means
with confidence intervals, settings, provenance) and ``evaluation.md``.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.logging import disable_progress_bar

from ..basics.adapters import named_base_model, tokenizer_of
from ..basics.files import file_sha256, full_disk_explained, write_jsonl, write_text
from ..basics.parts import Parts
from ..basics.provenance import git_commit, peak_memory_mib, provenance, source_name, weights_digest
from ..training.data import read_jsonl
from ..training.generation import (
    Sampling,
    TransformersBackend,
    answer_batches,
    batches_by_length,
    context_length,
    stop_tokens_of,
)
from ..training.loading import load_for_inference, require_tokenizer_of
from .evaluator import Evaluator
from .reference_losses import PromptAndAnswer, encode_answers
from .report import markdown_report, metrics_of, summarise
from .settings import EvaluationSettings
from .task import load_task

ROWS_NAME, RECORD_NAME = "rows.jsonl", "evaluation.json"


def evaluate(settings: EvaluationSettings, overwrite: bool = False) -> dict[str, Any]:
    """Let a model answer the rows of a task, and score the answers. An interrupted run is resumed.

    The result depends a little on ``batch_size``, since padding changes the rounding.

    Args:
        overwrite: replace an evaluation that was made with other settings.

    Returns:
        the contents of ``evaluation.json``.

    Raises:
        FileExistsError: if the output was made with other settings.
        FileNotFoundError: if there is no such task, data or adapter.
        ModuleNotFoundError: if the task needs a package that is not installed.
        TypeError: if the task's file holds no task.
        ValueError: if a setting, a row or the task's scores cannot be used.
        OSError: if the disk is full.
    """
    git_commit()  # cached now, so that a long run records the code that it started with
    disable_progress_bar()
    task = load_task(settings.task)
    metrics_of(task)  # refuses a taken name before any work
    rows = read_jsonl(settings.data, settings.max_rows)
    base, revision = settings.model, None
    if settings.adapter is not None:
        base, revision = named_base_model(settings.adapter, settings.model)
    if base is None:
        raise ValueError("model: got neither --model nor --adapter, expected a model, an adapter, or both.")
    tokenizer = tokenizer_of(base, settings.adapter, revision)
    max_new_tokens = settings.max_new_tokens or task.max_new_tokens
    sampling = Sampling(settings.temperature, 1.0, 0, max_new_tokens, stop_tokens_of(base, tokenizer))
    encoded = encode_answers(rows, tokenizer, sampling.stop_token_ids)
    model = load_for_inference(base, settings.dtype, tokenizer, settings.adapter, revision)
    _require_room(encoded, model, max_new_tokens if settings.answers else 0)
    require_tokenizer_of(model, tokenizer, (row.ids for row in encoded))
    recorded = asdict(settings) | {
        "task": task.name,
        "task_sha256": file_sha256(settings.task),
        "model": source_name(base),
        "adapter": settings.adapter and source_name(settings.adapter),
        "weights_sha256": weights_digest(model),
        "data": Path(settings.data).name,
        "data_sha256": file_sha256(settings.data),
        "tokens_sha256": hashlib.sha256(json.dumps([e.ids for e in encoded]).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": sampling.stop_token_ids,
    }
    del recorded["output"]
    parts = Parts(Path(settings.output) / ROWS_NAME, RECORD_NAME)
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(parts.output, "All batches that were finished are kept."):
        if earlier := parts.begin(recorded, overwrite):
            return earlier
        backend = TransformersBackend(model, tokenizer, sampling, settings.batch_size)
        evaluator = Evaluator(task, tokenizer, backend, rows, encoded, settings.answers)
        batches = batches_by_length(range(len(rows)), lambda index: len(encoded[index].ids), settings.batch_size)
        finished = {batch["batch"] for batch in parts.finished()}
        answer_batches(batches, finished, evaluator.results, parts, settings.seed, "Evaluating")
        done = list(parts.finished())
        results = sorted((r for batch in done for r in batch["results"]), key=lambda result: result["row"])
        write_jsonl(parts.output, results)
        record = summarise(task, rows, results) | {
            "rows_sha256": file_sha256(parts.output),
            "generated_tokens": sum(r["generated_tokens"] for r in results),
            "seconds": round(sum(batch["seconds"] for batch in done), 1),
            "peak_memory_mib": peak_memory_mib(),
            "settings": recorded,
            **provenance(),
        }
        write_text(parts.output.with_name("evaluation.md"), markdown_report(record, task, rows, results))
        write_text(parts.provenance_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        parts.discard()
    return record


def _require_room(encoded: list[PromptAndAnswer], model: nn.Module, max_new_tokens: int) -> None:
    context = context_length(model.config)
    for number, row in enumerate(encoded, start=1):
        needed = max(len(row.prompt) + max_new_tokens, len(row.ids))
        if needed > context:
            raise ValueError(
                f"row {number}: its prompt of {len(row.prompt):,} tokens and an answer of up to {needed - len(row.prompt):,} are longer than "
                f"the model's context, expected at most {context:,}. Lower --max-new-tokens, or leave the row out."
            )
