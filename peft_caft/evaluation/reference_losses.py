"""Rows as prompt and answer tokens, and the cross entropy of each token of an answer."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..heads.backbone import base_model_of
from ..method.targets import IGNORE_INDEX
from ..training.chats import prompt_and_answer
from ..training.data import asked, encode
from ..training.generation import until_stop


@dataclass(frozen=True)
class PromptAndAnswer:
    """Token ids of one row.

    Attributes:
        prompt: what the model is asked with.
        context: what stands before the answer in training; it differs from the prompt if a token
            spans both, or the chat template shows the prompt differently.
        answer: the last answer, up to and including its end.
    """

    prompt: list[int]
    context: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.context + self.answer


def encode_answers(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> list[PromptAndAnswer]:
    """Tokenize rows as training does, without what a chat template puts after the end of an answer.

    Raises:
        ValueError: if a row has no answer or the tokenizer refuses it, naming the row.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        if "messages" not in row and "completion" not in row:
            raise ValueError(
                f"row {number}: got keys {sorted(row)}, expected 'messages', or 'prompt' and 'completion': there is no answer in it."
            )
        try:
            (tokens,) = encode([row | {"last_answer_only": True}], tokenizer, max_length=2**31, quiet=True).rows
            prompt, _ = prompt_and_answer(row)
            if prompt == []:
                raise ValueError("messages: got one answer and nothing before it, expected a prompt to answer.")
            prompt_ids = asked(prompt, tokenizer, row)
        except ValueError as error:
            raise ValueError(f"row {number}: {str(error).removeprefix('row 1: ')}") from error
        supervised = [label != IGNORE_INDEX for label in tokens["labels"]]
        start = supervised.index(True)
        end = supervised.index(False, start) if False in supervised[start:] else len(supervised)
        answer = until_stop(tokens["input_ids"][start:end], stop_token_ids)
        encoded.append(PromptAndAnswer(prompt_ids, tokens["input_ids"][:start], answer))
    return encoded


@torch.inference_mode()
def answer_losses(model: nn.Module, rows: Sequence[PromptAndAnswer], pad_token_id: int) -> list[list[float]]:
    """Cross entropy of each answer token of a batch of rows.

    Args:
        model: in evaluation mode, on its device.
        pad_token_id: any token, since padding is masked.

    Returns:
        for each row, one value per answer token, nats, computed in fp32.

    Raises:
        ValueError: if nothing stands before an answer.
    """
    longest = max(len(row.ids) for row in rows)
    first = min(len(row.context) for row in rows) - 1  # no earlier logits are needed
    if first < 0:
        raise ValueError("prompt: got one without tokens, expected at least one, from which to predict the answer.")
    device = next(model.parameters()).device
    input_ids = torch.tensor([row.ids + [pad_token_id] * (longest - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=device)
    kept = torch.arange(first, longest - 1, device=device)
    if "logits_to_keep" in inspect.signature(base_model_of(model).forward).parameters:
        logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, kept]
    losses = []
    for row, own in zip(rows, logits, strict=True):
        start = len(row.context) - 1 - first
        targets = torch.tensor(row.answer, device=own.device)
        loss = nn.functional.cross_entropy(own[start : start + len(targets)].float(), targets, reduction="none")
        losses.append(loss.tolist())
    return losses
