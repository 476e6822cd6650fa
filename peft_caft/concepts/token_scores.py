"""Teacher-forced cross entropy of every supervised token, and whether it is the most likely one.

Only supervised positions reach the lm_head, a chunk at a time, as in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..heads.backbone import Backbone, base_model_of
from ..heads.unembedding import target_scores
from ..method.targets import Supervision
from ..training.generation import batches_by_length
from .alignment import AlignedRow


@dataclass(frozen=True)
class TokenScores:
    """Scores of one model for the targets of one row, both ``(targets,)``.

    Attributes:
        cross_entropy: float64, nats.
        correct: bool, whether the target is the most likely token.
    """

    cross_entropy: np.ndarray
    correct: np.ndarray


@torch.inference_mode()
def score_tokens(
    model: nn.Module, rows: list[AlignedRow], collate: Callable, batch_size: int = 8, description: str = "Scoring"
) -> list[TokenScores]:
    """Scores of each row, in the order of ``rows``.

    Args:
        model: a causal language model, with or without PEFT adapters, in evaluation mode.
        rows: rows aligned with the model's tokenizer.
        collate: makes a batch of tensors ``(batch, tokens)`` (`peft_caft.training.data.collator`).
    """
    backbone = Backbone.of(model)
    plain = base_model_of(model).get_output_embeddings() is backbone.lm_head  # and no copy or adapter in its place
    batches = batches_by_length(range(len(rows)), lambda index: len(rows[index].input_ids), batch_size)
    scores: dict[int, TokenScores] = {}
    for indices in tqdm(batches, desc=description, unit=" batches", leave=False):
        batch = collate([rows[index].encoded for index in indices]).to(backbone.lm_head.weight.device)
        if not scores:
            plain = plain and _is_plain(backbone)
        found = _scores_in_chunks(backbone, batch) if plain else _scores_of_logits(model, batch)
        counts = [len(rows[index].targets) for index in indices]
        cross_entropies, hits = (values.cpu().split(counts) for values in found)
        for index, cross_entropy, correct in zip(indices, cross_entropies, hits, strict=True):
            scores[index] = TokenScores(cross_entropy.double().numpy(), correct.numpy())
    return [scores[index] for index in range(len(rows))]


def _is_plain(backbone: Backbone) -> bool:
    """Whether only norm and lm_head follow the layers."""
    try:
        backbone.probed()
    except TypeError:
        return False
    return True


def _scores_in_chunks(backbone: Backbone, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropies, nats, and hits, bool, of all targets in the batch; both ``(targets,)``."""
    own = Supervision.of(batch["labels"], 0).next_token
    with backbone.capture() as records:
        backbone.trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    states = records[-1].last_hidden_state.flatten(0, 1)[own.rows]
    cross_entropies, hits = target_scores(states, own.targets, backbone.unembedding())
    return cross_entropies, hits[:, 0]


def _scores_of_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`_scores_in_chunks` from the logits of a model that does more after its norm, row by row."""
    found = []
    for index in range(len(batch["labels"])):
        row = {name: values[index : index + 1] for name, values in batch.items()}
        own = Supervision.of(row["labels"], 0).next_token
        logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"], use_cache=False).logits
        log_probs = logits[0, own.rows].float().log_softmax(dim=1)
        found.append((-log_probs.gather(1, own.targets[:, None])[:, 0], log_probs.argmax(dim=1) == own.targets))
    cross_entropies, hits = zip(*found, strict=True)
    return torch.cat(cross_entropies), torch.cat(hits)
