"""Rows as prompt and answer tokens, and what the model gives for each token of a reference answer,
all earlier ones given.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..method.targets import IGNORE_INDEX
from ..training.data import encode
from ..training.generation import until_stop


@dataclass(frozen=True)
class PromptAndAnswer:
    """Tokens of one row: what is given, and the last answer up to and with the token that ends it."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


def encode_answers(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> list[PromptAndAnswer]:
    """Tokenize rows as training does; of what a chat template puts after the end of an answer,
    nothing is kept.

    Raises:
        ValueError: naming the row, if it has no answer, or the tokenizer cannot read it.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        if "messages" not in row and "completion" not in row:
            raise ValueError(
                f"row {number}: got keys {sorted(row)}, expected 'messages', or 'prompt' and 'completion': there is no answer in it."
            )
        try:
            (tokens,) = encode([row | {"last_answer_only": True}], tokenizer, max_length=2**31, quiet=True).rows
        except ValueError as error:
            raise ValueError(f"row {number}: {str(error).removeprefix('row 1: ')}") from error
        start = next(i for i, label in enumerate(tokens["labels"]) if label != IGNORE_INDEX)
        encoded.append(
            PromptAndAnswer(tokens["input_ids"][:start], until_stop(tokens["input_ids"][start:], stop_token_ids))
        )
    return encoded


@torch.inference_mode()
def answer_losses(model: nn.Module, rows: Sequence[PromptAndAnswer], pad_token_id: int) -> list[list[float]]:
    """Cross entropy of each answer token, nats, for a batch of rows.

    Args:
        model: in evaluation mode, on its device.
        pad_token_id: any token; padding is masked.
    """
    longest = max(len(row.ids) for row in rows)
    first = min(len(row.prompt) for row in rows) - 1  # no earlier logits are needed
    if first < 0:
        raise ValueError(
            "prompt: got one without tokens, expected at least one: the first token of an answer needs one before it."
        )
    device = next(model.parameters()).device
    input_ids = torch.tensor([row.ids + [pad_token_id] * (longest - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=device)
    kept = torch.arange(first, longest - 1, device=device)
    if _takes_logits_to_keep(model):
        logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, kept]
    losses = []
    for row, own in zip(rows, logits, strict=True):
        start = len(row.prompt) - 1 - first
        targets = torch.tensor(row.answer, device=own.device)
        loss = nn.functional.cross_entropy(own[start : start + len(targets)].float(), targets, reduction="none")
        losses.append(loss.tolist())
    return losses


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
