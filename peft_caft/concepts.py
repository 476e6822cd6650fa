"""``peft-caft concepts``: how dense a data set is in terms of several tokens, and how well models know them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .atomic import filling
from .checks import require_choice
from .concept_density import Density, RecommendedN, density, recommended_n
from .concept_heads import HeadKnowledge, head_knowledge, unigram_entropy
from .concept_losses import Comparison, ConceptLosses, ModelConcepts
from .data import collator, file_sha256, read_jsonl, require_tokenizer_of
from .heads import AuxiliaryHeads
from .provenance import provenance
from .term_alignment import AlignedRow, align, answer_texts
from .term_losses import TokenScores, score_tokens
from .terms import UNITS, guess_unit

BASE = "base"
GUESSED_FROM = 200  # answers


@dataclass(frozen=True)
class ConceptsSettings:
    """What `concepts` is asked for; see `peft-caft concepts --help`.

    Attributes:
        adapter: ``NAME=FOLDER`` of LoRA or CAFT adapters, or of whole models with the same tokenizer. A name that comes several times
            is one model in several runs, such as seeds.
        loss: score the model; without, its tokenizer is enough.
    """

    data: str
    model: str
    output: str
    unit: str = "auto"
    adapter: list[str] = field(default_factory=list)
    heads: str | None = None
    loss: bool = True
    plots: bool = True
    max_rows: int | None = None
    max_length: int = 512
    batch_size: int = 8
    dtype: str = "auto"
    examples: int = 12
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("unit", self.unit, ("auto", *UNITS))
        for name in ("max_rows", "max_length", "batch_size", "resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1.")
        if self.examples < 0:
            raise ValueError(f"examples: got {self.examples}, expected at least 0.")
        if not self.loss and (self.adapter or self.heads):
            given = "adapter" if self.adapter else "heads"
            raise ValueError(
                f"{given}: given with --no-loss, which reads no weights, expected one or the other. Leave --no-loss out to score "
                f"the {given}."
            )
        _ = self.adapters

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Name -> folders or Hub ids of its runs, in the order given."""
        found: dict[str, list[str]] = {}
        for given in self.adapter:
            name, separator, source = given.partition("=")
            if not separator or not name.strip() or not source:
                raise ValueError(f"adapter: got {given!r}, expected NAME=FOLDER, such as LoRA=runs/lora.")
            if name.strip() == BASE:
                raise ValueError(f"adapter: got the name {BASE!r}, which is the base model's, expected another one.")
            found.setdefault(name.strip(), []).append(source)
        if len({len(sources) for sources in found.values()}) > 1:
            counts = ", ".join(f"{len(sources)} of {name!r}" for name, sources in found.items())
            raise ValueError(
                f"adapter: got {counts}, expected as many runs of each, since they are compared in pairs."
            )
        return found


@dataclass(frozen=True)
class Concepts:
    """Everything that was found; what is written as ``concepts.json``."""

    unit: str
    unit_guessed: bool
    data: dict[str, Any]
    density: Density
    recommended: RecommendedN
    models: dict[str, ModelConcepts]
    comparisons: list[Comparison]
    unigram_entropy: float
    heads: list[HeadKnowledge]
    settings: ConceptsSettings
    provenance: dict[str, Any]

    def to_json(self) -> str:
        record = asdict(self)
        found = record["density"]
        found |= {
            "multi_token_tokens": self.density.multi_token_tokens,
            "continuing_tokens": self.density.continuing_tokens,
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def concepts(settings: ConceptsSettings) -> Concepts:
    """Find the terms, score the models, and write ``concepts.json``, ``.md``, ``.html`` and plots to ``settings.output``.

    Raises:
        FileNotFoundError, ValueError, TypeError, ModuleNotFoundError: as the message says.
    """
    from .concept_report import report
    from .concepts_page import page

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
    # What the first adapter, LoRA say, changed in the base model, and how the others, CAFT say, differ from it.
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
        from .concept_plots import plot_concepts
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
