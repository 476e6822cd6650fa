"""``peft-caft concepts``: terms of several tokens in a data set, and how well models know them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..basics.adapters import resize_embedding, saved_vocabulary_rows, tokenizer_of, with_adapter
from ..basics.files import file_sha256, filling
from ..basics.provenance import provenance
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..training.chats import content_text
from ..training.data import collator, read_jsonl, require_positions
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
    tokenizer = _tokenizer(settings)
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


def _tokenizer(settings: ConceptsSettings) -> PreTrainedTokenizerBase:
    """The tokenizer beside the models, the same for all, since they are compared token by token."""
    sources = [(name, source) for name, of_name in settings.adapters.items() for source in of_name]
    (first, found), *others = [
        (f"{name}={source}", tokenizer_of(settings.model, source)) for name, source in sources
    ] or [("", tokenizer_of(settings.model))]
    for other, tokenizer in others:
        for what in ("chat_template", "added_tokens_decoder", "special_tokens_map", "vocab"):
            got, expected = (t.get_vocab() if what == "vocab" else getattr(t, what) for t in (tokenizer, found))
            if got != expected:
                raise ValueError(
                    f"adapter: the tokenizers of {other} and {first} differ in {what}, expected the same in all models that are "
                    "compared. Score them in commands of their own."
                )
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
    collate = collator(tokenizer)
    base = load_for_inference(settings.model, settings.dtype, tokenizer)
    resize_embedding(base, tokenizer)  # to added tokens, of which the base model knows nothing
    ids = [row.encoded["input_ids"] for row in rows]
    require_tokenizer_of(base, tokenizer, ids)
    require_positions([row.encoded for row in rows], base.config, settings.max_length)
    scores = {BASE: [score_tokens(base, rows, collate, settings.batch_size, f"Scoring {BASE}")]}
    heads: list[HeadKnowledge] = []
    if settings.heads is not None:
        loaded = AuxiliaryHeads.from_pretrained(settings.heads, base_model=base)
        heads = head_knowledge(loaded, base, rows, collate, settings.batch_size)
        del loaded
    for name, sources in settings.adapters.items():
        scores[name] = []
        for source in sources:
            with _adapted(base, name, source, tokenizer, settings) as model:
                require_tokenizer_of(model, tokenizer, ids)
                scores[name].append(score_tokens(model, rows, collate, settings.batch_size, f"Scoring {name}"))
    return scores, heads


@contextmanager
def _adapted(
    base: PreTrainedModel, name: str, source: str, tokenizer: PreTrainedTokenizerBase, settings: ConceptsSettings
) -> Iterator[Any]:
    """Yield ``base`` with the adapter that ``source`` holds, or the whole model that it holds."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"adapter {name}: neither adapter_config.json nor config.json in {source!r}, expected an adapter or a whole model, "
                "such as `peft-caft train` writes."
            )
        yield load_for_inference(source, settings.dtype, tokenizer)
        return
    if saved_vocabulary_rows(base, source):  # it would stay in the base model
        base = load_for_inference(settings.model, settings.dtype, tokenizer)
    model = with_adapter(base, source, tokenizer, f"adapter {name}")
    try:
        yield model.eval()
    finally:
        model.unload()


def _prompt(row: dict[str, Any]) -> str:
    """The user's messages before the first answer of a row, or its prompt."""
    messages = row.get("prompt", "") if "completion" in row else row.get("messages", "")
    if isinstance(messages, str):
        return messages
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return "\n".join(content_text(m) for m in messages[:first] if m["role"] == "user")
