"""``peft-caft concepts``: how dense a data set is in terms of several tokens, and how well models
know them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..basics.files import file_sha256, filling
from ..basics.provenance import provenance
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..training.data import collator, read_jsonl, require_tokenizer_of
from .alignment import AlignedRow, align, answer_texts
from .density import density, recommended_n
from .findings import Concepts
from .head_knowledge import HeadKnowledge, head_knowledge, unigram_entropy
from .losses import ConceptLosses
from .settings import BASE, ConceptsSettings
from .terms import UNITS, guess_unit
from .token_scores import TokenScores, score_tokens

GUESSED_FROM = 200  # answers


def concepts(settings: ConceptsSettings) -> Concepts:
    """Find the terms, score the models, and write ``concepts.json``, ``.md``, ``.html`` and plots
    to ``settings.output``.

    Raises:
        FileNotFoundError, ValueError, TypeError, ModuleNotFoundError: as the message says.
    """
    from .page import page
    from .report import report

    draw = _drawing() if settings.plots else None
    raw = read_jsonl(settings.data, settings.max_rows)
    unit = settings.unit if settings.unit != "auto" else guess_unit(answer_texts(raw[:GUESSED_FROM]))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows = align(raw, tokenizer, UNITS[unit], settings.max_length)
    scores: dict[str, list[list[TokenScores]]] = {}
    heads: list[HeadKnowledge] = []
    offered = 5
    if settings.loss:
        scores, heads = _score(settings, rows, tokenizer)
        offered = heads[-1].tokens_ahead if heads else offered
    losses = ConceptLosses(rows, settings.resamples, settings.seed)
    found_density = density(rows)
    # What the first adapter, LoRA say, changed in the base model, and how the others, CAFT say,
    # differ from it.
    adapters = list(settings.adapters)
    pairs = [(BASE, name) for name in adapters[:1]] + [(adapters[0], name) for name in adapters[1:]]
    found = Concepts(
        unit=unit,
        unit_guessed=settings.unit == "auto",
        data={
            "file": Path(settings.data).name,
            "sha256": file_sha256(settings.data),
            "rows_read": len(raw),
            "rows_without_supervised_tokens": len(raw) - len(rows),
        },
        density=found_density,
        recommended=recommended_n(found_density, offered),
        models={name: losses.of(runs) for name, runs in scores.items()},
        comparisons=[losses.compare(first, scores[first], second, scores[second]) for first, second in pairs],
        unigram_entropy=unigram_entropy(rows),
        heads=heads,
        settings=settings,
        provenance=provenance(),
    )
    shown = rows[: settings.examples]
    prompts = [_prompt(raw[row.number - 1]) for row in shown]
    shown_scores = {name: runs[0][: settings.examples] for name, runs in scores.items()}
    with filling(settings.output) as folder:
        (folder / "concepts.json").write_text(found.to_json(), encoding="utf-8")
        (folder / "concepts.md").write_text(report(found) + "\n", encoding="utf-8")
        html = page(found, shown, prompts, shown_scores, tokenizer.convert_ids_to_tokens)
        (folder / "concepts.html").write_text(html, encoding="utf-8")
        if draw is not None:
            draw(folder, found)
    return found


def _drawing() -> Any:
    """Before anything is computed, since a missing matplotlib should not be found out at the end."""
    try:
        from .plots import plot_concepts
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, expected it for the plots. Run: pip install matplotlib, or pass --no-plots.",
            name=error.name,
        ) from error
    return plot_concepts


def _score(
    settings: ConceptsSettings, rows: list[AlignedRow], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[list[TokenScores]]], list[HeadKnowledge]]:
    """Scores of the base model and of each run of the adapters, and what the heads know."""
    base = _load(settings.model, settings.dtype)
    require_tokenizer_of(base, tokenizer)
    collate = collator(tokenizer)
    scores = {BASE: [score_tokens(base, rows, collate, settings.batch_size, f"Scoring {BASE}")]}
    heads: list[HeadKnowledge] = []
    if settings.heads is not None:
        loaded = AuxiliaryHeads.from_pretrained(settings.heads, base_model=base)
        heads = head_knowledge(loaded, base, rows, collate, settings.batch_size)
        del loaded
    for name, sources in settings.adapters.items():
        scores[name] = []
        for source in sources:
            with _adapted(base, name, source, settings.dtype) as model:
                require_tokenizer_of(model, tokenizer)
                scores[name].append(score_tokens(model, rows, collate, settings.batch_size, f"Scoring {name}"))
    return scores, heads


def _load(source: str, dtype: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _adapted(base: PreTrainedModel, name: str, source: str, dtype: str) -> Iterator[nn.Module]:
    """``base`` with an adapter inside the block, or the whole model that ``source`` holds."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"adapter {name}: neither adapter_config.json nor config.json in {source!r}, expected the folder of an adapter or "
                "of a whole model, as `peft-caft train` writes them."
            )
        yield _load(source, dtype)
        return
    try:
        model = PeftModel.from_pretrained(base, source)
    except RuntimeError as error:  # sizes that differ
        raise ValueError(f"adapter {name}: {source!r} does not fit the base model: {error}") from error
    try:
        yield model.eval()
    finally:
        model.unload()


def _prompt(row: dict[str, Any]) -> str:
    """What the first answer of a row answers, as far as a reader needs it."""
    if "messages" not in row:
        return row.get("prompt", "")
    first = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return "\n".join(m["content"] for m in row["messages"][:first] if m["role"] == "user")
