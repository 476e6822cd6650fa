"""``peft-caft distill``: the base model's own answers to prompts, as training data for heads."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedTokenizerBase

from ..basics.adapters import tokenizer_of
from ..basics.checkpoints import load_config
from ..basics.contents import contents_of
from ..basics.files import file_sha256, full_disk_explained, write_jsonl, write_text
from ..basics.parts import Parts
from ..basics.provenance import git_commit, provenance, source_name, weights_digest
from .distilled_answers import AnswerReader
from .generation import (
    Backend,
    Sampling,
    TransformersBackend,
    VLLMBackend,
    answer_batches,
    batches_by_length,
    context_length,
    stop_tokens_of,
)
from .loading import load_for_inference, require_tokenizer_of
from .prompts import Prompt, prepare_prompts, read_prompts
from .settings import DistillationSettings

KEPT = ("complete", "prompt_index")  # fields of a result that its row keeps, besides prompt and answer
REASONS = ("empty", "repetitive", "untrainable", "duplicate")


def distill(settings: DistillationSettings, overwrite: bool = False) -> dict[str, Any]:
    """Let the base model answer prompts, and write JSONL. An interrupted run is resumed.

    Under several processes (``accelerate launch``) each answers a share. The result depends on
    ``batch_size``, since a batch's random numbers are drawn together, but not on interruptions.

    Args:
        overwrite: replace an output or an interrupted run that was made with other settings.

    Returns:
        the provenance, also written beside the output: settings, counts, tokens, seconds, versions.

    Raises:
        FileExistsError: if the output was made with other settings.
        FileNotFoundError: if there is no such file of prompts.
        ValueError: if a setting is out of range, or no prompt can be used.
        OSError: if the disk is full.
    """
    git_commit()  # cached now, so that a long run records the code that it started with
    # Without ``cpu`` on a machine that has no accelerator, each process takes itself for the only
    # one. Processes that are done wait for the others, however long those take.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    if settings.backend == "vllm" and state.num_processes > 1:
        raise ValueError(
            f"backend: got 'vllm' in {state.num_processes} processes, expected one, since vLLM starts its own. Run the "
            "command without accelerate launch."
        )
    tokenizer = tokenizer_of(settings.model)
    source = read_prompts(settings.prompts, settings.split, settings.column, settings.max_prompts)
    prompts, duplicates = prepare_prompts(source.rows, tokenizer, settings.system)
    config = load_config(settings.model)
    fitting = _fitting(prompts, config, settings.max_new_tokens)
    backend, weights_sha256 = _backend(settings, tokenizer, [prompt.input_ids for prompt in fitting], state)
    requests = [(prompt, sample) for prompt in fitting for sample in range(settings.samples_per_prompt)]
    batches = batches_by_length(requests, lambda request: len(request[0].input_ids), backend.batch_size)
    reader = AnswerReader(tokenizer, backend.sampling.stop_token_ids, settings.max_repetition)

    def answers(batch: list[tuple[Prompt, int]], seed: int) -> tuple[list[dict[str, Any]], int]:
        found = backend.answers([prompt.input_ids for prompt, _ in batch], seed)
        results = [reader.read(prompt, sample, ids) for (prompt, sample), ids in zip(batch, found, strict=True)]
        return results, sum(map(len, found))

    tokenized = "".join(json.dumps(prompt.input_ids) for prompt in fitting)  # by tokenizer and chat template
    recorded = asdict(settings) | {
        "model": source_name(settings.model),
        "model_revision": getattr(config, "_commit_hash", None),
        "weights_sha256": weights_sha256,
        **(contents_of("model", settings.model) if settings.backend == "vllm" else {}),
        "prompts": source.name,
        "prompts_sha256": source.sha256,
        "tokenized_prompts_sha256": hashlib.sha256(tokenized.encode()).hexdigest(),
        "stop_token_ids": backend.sampling.stop_token_ids,
        "batch_size": backend.batch_size,
    }
    del recorded["output"]
    parts = Parts(Path(settings.output))
    with full_disk_explained(parts.output, "All batches that were finished are kept."):
        done = parts.begin(recorded, overwrite) if state.is_main_process else None
        state.wait_for_everyone()
        if not parts.folder.is_dir():
            return done or {}
        finished = {batch["batch"] for batch in parts.finished()}
        state.wait_for_everyone()  # nobody writes before all have read
        answer_batches(
            batches, finished, answers, parts, settings.seed, "Distilling", state.process_index, state.num_processes
        )
        state.wait_for_everyone()
        if not state.is_main_process:
            return {}
        record = _join(parts, fitting)
        record["counts"] = {
            "prompts": len(source.rows),
            "duplicate_prompts": duplicates,
            "too_long_prompts": len(prompts) - len(fitting),
        } | record["counts"]
        record |= {"settings": recorded} | provenance()
        write_text(parts.provenance_path, json.dumps(record, indent=2) + "\n")
        parts.discard()
    return record


def _fitting(prompts: list[Prompt], config: Any, max_new_tokens: int) -> list[Prompt]:
    context = context_length(config)
    if max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens:,}, expected less than {context:,}, the model's context, which also holds "
            "the prompt."
        )
    fitting = [prompt for prompt in prompts if len(prompt.input_ids) + max_new_tokens <= context]
    if not fitting:
        raise ValueError(
            f"prompts: the shortest has {min(len(p.input_ids) for p in prompts):,} tokens, expected at most "
            f"{context - max_new_tokens:,}: the model's context of {context:,} without max_new_tokens={max_new_tokens:,}. "
            "Shorten the prompts or lower --max-new-tokens."
        )
    return fitting


def _backend(
    settings: DistillationSettings, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], state: PartialState
) -> tuple[Backend, str | None]:
    stops = stop_tokens_of(settings.model, tokenizer)
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens, stops)
    if settings.backend == "vllm":
        return VLLMBackend(settings.model, settings.dtype, sampling, settings.batch_size or 1024), None
    model = load_for_inference(settings.model, settings.dtype, tokenizer, device=state.device)
    require_tokenizer_of(model, tokenizer, prompts)
    return TransformersBackend(model, tokenizer, sampling, settings.batch_size or 32), weights_digest(model)


def _join(parts: Parts, prompts: list[Prompt]) -> dict[str, Any]:
    """Write the output in the order of the prompts, and return the counts for the provenance."""
    by_index = {prompt.index: prompt for prompt in prompts}
    finished = list(parts.finished())
    results = [result for batch in finished for result in batch["results"]]
    results.sort(key=lambda result: (result["prompt_index"], result["sample"]))
    seen: set[tuple[int, str]] = set()
    rejected = Counter(dict.fromkeys(REASONS, 0))
    kept = []
    for result in results:
        key = (result["prompt_index"], result["answer"])
        if reason := result["rejected"] or ("duplicate" if key in seen else None):
            rejected[reason] += 1
        else:
            seen.add(key)
            kept.append(result)
    rows = (by_index[r["prompt_index"]].row(r["answer"]) | {name: r[name] for name in KEPT} for r in kept)
    write_jsonl(parts.output, rows)
    complete = sum(r["complete"] for r in kept)
    tokens, seconds = sum(r["tokens"] for r in results), sum(batch["seconds"] for batch in finished)
    return {
        "file": parts.output.name,
        "sha256": file_sha256(parts.output),
        "counts": {"answers": len(results), "kept": len(kept), "complete": complete, "cut_off": len(kept) - complete}
        | {f"rejected_{reason}": rejected[reason] for reason in REASONS}
        | {"retokenized_differently": sum(not r["same_tokens"] for r in kept)},
        "tokens": tokens,
        "kept_tokens": sum(r["tokens"] for r in kept),
        "process_seconds": round(seconds, 1),  # summed over the processes
        "tokens_per_second_per_process": round(tokens / max(seconds, 1e-9), 1),
    }


def distillation_table(record: dict[str, Any]) -> list[list[str]]:
    """Rows of the table that the command prints, made from the provenance."""
    labels = {
        "prompts": "prompts read",
        "duplicate_prompts": "- duplicates, left out",
        "too_long_prompts": "- too long for the context, left out",
        "answers": "answers",
        "rejected_empty": "- empty, left out",
        "rejected_repetitive": "- repetitive, left out",
        "rejected_untrainable": "- that the chat template does not tell from their prompts, left out",
        "rejected_duplicate": "- duplicates, left out",
        "kept": "rows written",
        "complete": "- ended by the model",
        "cut_off": "- cut off at the longest answer",
        "retokenized_differently": "- whose text is tokenized differently than it was written",
    }
    rows = [[label, f"{record['counts'][name]:,}"] for name, label in labels.items()]
    rows.append(["tokens generated", f"{record['tokens']:,}"])
    rows.append(["tokens/s, per process", f"{record['tokens_per_second_per_process']:,}"])
    return rows
