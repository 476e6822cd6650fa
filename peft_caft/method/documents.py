"""Which tokens of a batch belong to one document, told by what the model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADDED_TO_MASKED = -1000.0  # or less; what architectures add to the scores of near tokens is far above it


@dataclass(frozen=True)
class Documents:
    """What tells whether two tokens of a sequence belong to one document; all of it must agree.

    - ``attention_mask`` ``(batch, tokens)``: 0 for padding. Other numbers are those of documents,
      which several libraries pass for packed rows.
    - ``attention_mask`` ``(batch, 1, tokens, tokens)``, or a dict of them as transformers makes it:
      tokens of one document attend to earlier ones.
    - ``position_ids`` ``(batch, tokens)``: without an attention mask every step but 1 begins a
      document, as in transformers' ``find_packed_sequence_indices``. With one, transformers goes by
      the mask, and steps forward begin none here, since positions may be stretched.
    - ``position_ids`` ``(axes, batch, tokens)``, as models of images take them: a document begins
      where the first axis goes back, or where all are 0.
    - ``seq_idx`` ``(batch, tokens)``: the document's number.
    - ``cu_seq_lens_q`` or ``cu_seq_lens_k`` ``(documents + 1,)``: where documents begin in the
      flattened batch, and where the last one ends.

    A batch of 1 stands for every sequence.

    Attributes:
        numbers: ``(batch, tokens)`` each, equal in one document; NaN, equal to nothing, at padding.
        masks: ``(batch, tokens, tokens)`` each, bool, or floating and added to the scores.
    """

    numbers: list[Tensor]
    masks: list[Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], labels: Tensor) -> Documents:
        """Find them without waiting for the device.

        Args:
            inputs: keyword arguments of the model.
            labels: ``(batch, tokens)``; only shape and device count.

        Raises:
            ValueError: if one of them has a shape or type from which documents cannot be told.
        """
        batch, tokens = labels.shape

        def is_per_token(tensor: Tensor) -> bool:
            return tensor.dim() == 2 and tensor.shape[0] in (1, batch) and tensor.shape[1] == tokens

        def given(name: str, value: Any) -> Tensor:
            if not isinstance(value, Tensor):
                raise _refused(name, f"a {type(value).__name__}", "a tensor")
            return value.to(labels.device)

        def refused(name: str, value: Tensor, expected: str) -> ValueError:
            return _refused(name, f"{value.dtype} of shape {tuple(value.shape)}", expected)

        numbers, masks = [], []
        mask = inputs.get("attention_mask")
        for value in mask.values() if isinstance(mask, Mapping) else [mask]:
            if value is None:
                continue
            value = given("attention_mask", value)
            pairwise = value.dim() == 4 and value.shape[2:] == (tokens, tokens) and value.shape[0] in (1, batch)
            if is_per_token(value):
                numbers.append(value.float().masked_fill(value == 0, torch.nan))
            elif pairwise and (value.is_floating_point() or value.dtype == torch.bool):
                masks.append(value[:, 0])
            else:
                expected = f"({batch}, {tokens}), or boolean or floating ({batch}, 1, {tokens}, {tokens})"
                raise refused("attention_mask", value, expected)
        if (value := inputs.get("position_ids")) is not None:
            value = given("position_ids", value)
            if is_per_token(value):
                begins = _steps(value) != 1 if mask is None else _steps(value) <= 0
            elif value.dim() == 3 and is_per_token(value[0]):
                begins = (_steps(value[0]) < 0) | (value == 0).all(dim=0)
            else:
                raise refused("position_ids", value, f"({batch}, {tokens}) or (axes, {batch}, {tokens})")
            numbers.append(begins.cumsum(1))
        if (value := inputs.get("seq_idx")) is not None:
            numbers.append(value := given("seq_idx", value))
            if not is_per_token(value):
                raise refused("seq_idx", value, f"({batch}, {tokens})")
        name = "cu_seq_lens_k" if inputs.get("cu_seq_lens_q") is None else "cu_seq_lens_q"
        if (value := inputs.get(name)) is not None:
            value = given(name, value)
            if value.dim() != 1:
                raise refused(name, value, "(documents + 1,)")
            places = torch.arange(batch * tokens, device=labels.device)
            numbers.append(torch.bucketize(places, value.long(), right=True).view(batch, tokens))
        return cls(numbers, masks)

    def contain_both(self, tokens_ahead: int) -> list[Tensor]:
        """For each thing that tells: whether a token and the one so many ahead are in one document.

        Returns:
            bool ``(batch, tokens - tokens_ahead)`` each.
        """
        k = tokens_ahead
        attended = [mask.diagonal(-k, dim1=1, dim2=2) for mask in self.masks]
        return [
            *(number[:, k:] == number[:, :-k] for number in self.numbers),
            *(mask if mask.dtype == torch.bool else mask > ADDED_TO_MASKED for mask in attended),
        ]


def _steps(positions: Tensor) -> Tensor:
    """Each position minus the one before it, of their shape; 1 in the first place."""
    return torch.diff(positions, dim=1, prepend=positions[:, :1] - 1)


def _refused(name: str, got: str, expected: str) -> ValueError:
    return ValueError(
        f"{name}: got {got}, expected {expected}: heads must not predict across documents, which cannot be told apart by it. Pass "
        "another one, or wrap the step in auxiliary_loss_enabled(False)."
    )
