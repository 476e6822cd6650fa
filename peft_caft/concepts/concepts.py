"""``peft-caft concepts``: terms of several tokens in a data set, and how well models know them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..basics.files import file_sha256, filling
from ..basics.provenance import provenance
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..training.data import collator, read_jsonl
from ..training.loading import load_for_inference, require_tokenizer_of
from .alignment import AlignedRow, align, answer_texts
from .density import USUAL_N, density, recommended_n
from .findings import Concepts
from .head_knowledge import HeadKnowledge, head_knowledge, unigram_entropy
from .losses import ConceptLosses
from .page import page
from .report import report
from .settings import BASE, ConceptsSettings
from .terms import UNITS, guess_unit
from .token_scores import TokenScores, score_tokens

GUESSED_FROM = 200  # answers


def concepts(settings: ConceptsSettings) -> Concepts:
    """Find the terms, score the models, and write ``concepts.*`` and plots to ``settings.output``.

    Raises:
        FileNotFoundError: if the data, a model, heads or an adapter are not there.
        ValueError: if data, tokenizer, heads or an adapter do not fit the base model.
        TypeError: if a model is no causal language model that heads can read.
        ModuleNotFoundError: if plots are asked for and matplotlib is not installed.
    """
    draw = _drawing() if settings.plots else None
    raw = read_jsonl(settings.data, settings.max_rows)
    unit = settings.unit if settings.unit != "auto" else guess_unit(answer_texts(raw[:GUESSED_FROM]))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows = align(raw, tokenizer, UNITS[unit], settings.max_length)
    scores, heads = _score(settings, rows, tokenizer) if settings.loss else ({}, [])
    losses = ConceptLosses(rows, settings.resamples, settings.seed)
    found_density = density(rows)
    # The first adapter is compared with the base model, the others with the first.
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
        recommended=recommended_n(found_density, heads[-1].tokens_ahead if heads else USUAL_N),
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
    """`plot_concepts`, imported before any work, so that a missing matplotlib shows at once."""
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
    """Model -> scores of each of its runs, and what the heads know."""
    base = load_for_inference(settings.model, settings.dtype)
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


@contextmanager
def _adapted(base: PreTrainedModel, name: str, source: str, dtype: str) -> Iterator[nn.Module]:
    """Yield ``base`` with the adapter that ``source`` holds, or the whole model that it holds."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"adapter {name}: neither adapter_config.json nor config.json in {source!r}, expected an adapter or a whole model, "
                "such as `peft-caft train` writes."
            )
        yield load_for_inference(source, dtype)
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
    """The user's messages before the first answer of a row, or its prompt."""
    if "messages" not in row:
        return row.get("prompt", "")
    first = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return "\n".join(m["content"] for m in row["messages"][:first] if m["role"] == "user")
