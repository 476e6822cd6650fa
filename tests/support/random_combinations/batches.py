"""Micro-batches of a `Case`, and where heads may have targets in them, written plainly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case

IMAGE_TOKEN, IMAGE_TOKENS = 96, 4  # of an image of 8 x 8 in patches of 4 x 4


@dataclass
class Batch:
    """One micro-batch. ``documents[b][t]`` is the number of the document, None for padding."""

    inputs: dict[str, Tensor]
    labels: Tensor
    documents: list[list[int | None]]


def items_in(all_batches: list[Batch]) -> int:
    """What Trainer passes as num_items_in_batch."""
    return max(1, sum(int((batch.labels[:, 1:] != -100).sum()) for batch in all_batches))


def dtype_of_base(case: Case) -> torch.dtype:
    if case.precision in ("fp32", "bf16 autocast", "fp16 autocast"):
        return torch.float32
    return torch.float16 if case.precision == "fp16 base" else torch.bfloat16


def batches(case: Case, seed: int | None = None) -> list[Batch]:
    return [_batch(case, (case.seed if seed is None else seed) * 10 + index) for index in range(case.micro_batches)]


def _batch(case: Case, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows, tokens = case.rows, case.tokens
    ids = torch.randint(1, 95, (rows, tokens), generator=generator)
    documents: list[list[int | None]] = [[0] * tokens for _ in range(rows)]
    inputs: dict[str, Tensor] = {}
    if case.layout.startswith("packed") or case.layout == "one row of positions":
        rows_of_positions = []
        for row in range(rows):
            lengths: list[int] = []
            while sum(lengths) < tokens:
                lengths.append(min(number(1, max(2, tokens * 2 // 3)), tokens - sum(lengths)))
            if case.layout == "one row of positions" and row:
                documents[row] = list(documents[0])
                continue
            documents[row] = [index for index, length in enumerate(lengths) for _ in range(length)]
            rows_of_positions.append([t for length in lengths for t in range(length)])
        inputs["position_ids"] = torch.tensor(rows_of_positions)
        inputs["use_cache"] = False  # with a cache transformers does not look for documents
    numbers = torch.tensor([[0 if document is None else document for document in row] for row in documents])
    if case.layout == "packed with mask":  # of which transformers makes one document
        inputs["attention_mask"] = torch.ones_like(ids)
    elif case.layout == "packed, numbers in mask":
        inputs["attention_mask"] = numbers + 1
    elif case.layout == "packed, seq_idx":
        inputs["seq_idx"] = numbers.int()
    elif case.layout == "packed, cu_seq_lens":
        begins = documents_begin(documents).flatten().nonzero()[:, 0].tolist()
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([*begins, rows * tokens]).int())
    elif case.layout == "packed, mask of pairs":
        pairs = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
        lowest = torch.finfo(dtype_of_base(case)).min
        added = torch.zeros(pairs.shape, dtype=dtype_of_base(case)).masked_fill(~pairs, lowest)
        inputs["attention_mask"] = pairs if case.attention == "sdpa" else added
    if case.layout in ("packed, seq_idx", "packed, cu_seq_lens", "packed, numbers in mask") and number(0, 1):
        del inputs["position_ids"]
    if case.layout in ("mask of ones", "right", "left", "both sides", "left with positions"):
        mask = torch.ones_like(ids)
        for row in range(rows):
            left = number(0, tokens - 1) if case.layout in ("left", "left with positions", "both sides") else 0
            right = number(0, tokens - 1 - left) if case.layout in ("right", "both sides") else 0
            mask[row, :left] = 0
            mask[row, tokens - right :] = 0
            documents[row] = [0 if mask[row, t] else None for t in range(tokens)]
        inputs["attention_mask"] = mask
        if case.layout == "left with positions":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if case.images:
        ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator).to(dtype_of_base(case))
    labels = _labels(case, ids, documents, generator)
    if case.embedded:
        width = 32
        embeddings = torch.randn(rows, tokens, width, generator=generator).to(dtype_of_base(case))
        # As enable_input_require_grads does it for embeddings that the model looks up.
        inputs["inputs_embeds"] = embeddings.requires_grad_(case.checkpointing.startswith("reentrant"))
    else:
        inputs["input_ids"] = ids
    return Batch(inputs, labels, documents)


def _labels(case: Case, ids: Tensor, documents: list[list[int | None]], generator: torch.Generator) -> Tensor:
    labels, rows, tokens = ids.clone(), *ids.shape

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    match case.labels:
        case "prompt":
            for row in range(rows):
                labels[row, : number(0, tokens)] = -100
        case "gaps":
            labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        case "other tokens":
            labels = torch.randint(1, 95, labels.shape, generator=generator)
        case "one row without":
            labels[number(0, rows - 1)] = -100
        case "one token":
            for row in range(rows):
                kept = number(0, tokens - 1)
                labels[row, :kept] = -100
                labels[row, kept + 1 :] = -100
        case "none":
            labels[:] = -100
    labels[labels == IMAGE_TOKEN] = -100
    if case.labels != "padding too":
        padding = torch.tensor([[document is None for document in row] for row in documents])
        labels[padding] = -100
    if case.layout.startswith("packed") and number(0, 1):  # as padding-free collators do
        labels[documents_begin(documents)] = -100
    return labels


def documents_begin(documents: list[list[int | None]]) -> Tensor:
    """Where a document begins, bool ``(batch, tokens)``."""
    return torch.tensor([[t == 0 or row[t] != row[t - 1] for t in range(len(row))] for row in documents])


def allowed(case: Case, batch: Batch, step: int, forward: int) -> tuple[Tensor, list[int]]:
    """Where head k may have a target, bool ``(n + 1, batch, tokens)``, and how many there are before the draw."""
    rows, tokens = batch.labels.shape
    mask = torch.zeros(case.heads + 2, rows, tokens, dtype=torch.bool)
    drawn = torch.ones(rows * tokens, dtype=torch.bool)
    if case.fraction < 1:  # new in each forward pass, and the same after a resume
        seed = step * 1_000_003 + forward
        drawn = torch.rand(rows * tokens, generator=torch.Generator().manual_seed(seed)) < case.fraction
    counts = []
    for k in range(2, case.heads + 2):
        counts.append(0)
        for b in range(rows):
            for t in range(tokens - k):
                here, there = batch.documents[b][t], batch.documents[b][t + k]
                if here is not None and here == there:
                    mask[k, b, t] = drawn[b * tokens + t]
                    counts[-1] += int(batch.labels[b, t + k] != -100)
    return mask, counts
