"""Which supervised token belongs to which term of the answer, by character offsets.

`peft_caft.training.data.encode_row` alone decides what is supervised. Here it runs with a tokenizer
whose token ids remember the text and the characters that they stand for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..basics.checkpoints import require_fast
from ..method.targets import IGNORE_INDEX
from ..training.chats import content_text
from ..training.data import encode_row, require_supervised
from ..training.generation import special_token_ids
from .terms import Span

BETWEEN, SPECIAL, CUT = -1, -2, -3  # kinds of tokens that lie in no term
GAP = "\n\n"  # between the answers of one row, where it has several


class LocatedToken(int):
    """A token id that knows its characters: ``text[start:end]``."""

    text: str
    start: int
    end: int

    @classmethod
    def at(cls, token_id: int, text: str, span: Span) -> LocatedToken:
        token = cls(token_id)
        token.text, (token.start, token.end) = text, span
        return token


class LocatingTokenizer:
    """Wraps a fast tokenizer; its token ids are `LocatedToken`.

    Raises:
        ValueError: if the tokenizer is not fast, and so gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        require_fast(tokenizer)
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[Any]]:
        found = self.tokenizer(text, **kwargs | {"return_offsets_mapping": True})
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return {**found, "input_ids": [LocatedToken.at(token_id, text, span) for token_id, span in pairs]}


@dataclass(frozen=True)
class Target:
    """A supervised token that the model predicts.

    Attributes:
        position: index in the row; at least 1.
        start, end: characters in the row's text. Tokens that are parts of one character share it.
        term: index of its term in the row's terms; or `BETWEEN` (punctuation, white space),
            `SPECIAL` (such as the end of the answer), or `CUT` (by the maximal length).
        place: 1 for the first token of its term, and so on; 0 outside of terms.
    """

    position: int
    start: int
    end: int
    term: int
    place: int


@dataclass(frozen=True)
class Term:
    """A term all of whose tokens are targets; ``targets`` are their indices among the row's."""

    text: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class AlignedRow:
    """A row of data, encoded as for training, with its terms.

    Attributes:
        number: line in the file, from 1 on, without blank lines.
        input_ids, labels: token ids, and labels (-100 where unsupervised).
        text: the supervised part of the row.
        targets, terms: in the order of the text.
        shared_tokens: number of tokens that cover characters of more than one term.
        overhanging_tokens: number of tokens of a term that also cover punctuation beside it.
        swallowed_terms: number of terms whose tokens all count for a neighbour.
    """

    number: int
    input_ids: list[int]
    labels: list[int]
    text: str
    targets: list[Target]
    terms: list[Term]
    shared_tokens: int
    overhanging_tokens: int
    swallowed_terms: int

    @property
    def encoded(self) -> dict[str, list[int]]:
        return {"input_ids": self.input_ids, "labels": self.labels}

    def length_of(self, target: Target) -> int:
        """Number of tokens in the term of ``target``; 0 if it lies in none."""
        return len(self.terms[target.term].targets) if target.term >= 0 else 0


def align(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    terms_of: Callable[[str], list[Span]],
    max_length: int,
) -> list[AlignedRow]:
    """Encode rows as for training and find their terms; rows without a target are left out.

    Args:
        rows: rows that `peft_caft.training.data.read_jsonl` returned.
        tokenizer: a fast one.
        terms_of: finds the terms of a text, as those in `peft_caft.concepts.terms.UNITS` do.
        max_length: tokens; longer rows lose their end.

    Raises:
        ValueError: if a row cannot be encoded (the message names it), or no row has a target.
    """
    locating, specials = LocatingTokenizer(tokenizer), special_token_ids(tokenizer)
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        specials.discard(tokenizer.unk_token_id)  # it stands for characters
    aligned = []
    for number, row in enumerate(tqdm(rows, desc="Aligning terms", unit=" rows", leave=False, mininterval=1), start=1):
        try:
            input_ids, labels = encode_row(row, locating)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        found = _align_row(number, input_ids, labels, specials, terms_of, max_length)
        if found.targets:
            aligned.append(found)
    require_supervised(aligned, rows, max_length)
    return aligned


def answer_texts(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The answers of rows, without what the chat template adds."""
    texts: list[str] = []
    for row in rows:
        answer = next(row[name] for name in ("completion", "messages", "text") if name in row)
        if isinstance(answer, str):
            texts.append(answer)
        else:
            texts += [content_text(message) for message in answer if message["role"] == "assistant"]
    return texts


@dataclass
class _Piece:
    """A supervised token while its term is looked for."""

    position: int
    start: int
    end: int
    special: bool
    owner: int = BETWEEN


def _align_row(
    number: int,
    input_ids: list[int],
    labels: list[int],
    specials: set[int],
    terms_of: Callable[[str], list[Span]],
    max_length: int,
) -> AlignedRow:
    text, pieces = _supervised_text(input_ids, labels, specials)
    spans = _terms_between_specials(text, pieces, terms_of)
    seams = _find_owners(text, pieces, spans, max_length)
    owned: list[list[int]] = [[] for _ in spans]  # positions of each term's tokens
    for piece in pieces:
        if piece.owner >= 0:
            owned[piece.owner].append(piece.position)
    whole = [index for index, own in enumerate(owned) if own and own[0] > 0 and own[-1] < max_length]
    numbering = {old: new for new, old in enumerate(whole)}
    targets: list[Target] = []
    members: list[list[int]] = [[] for _ in numbering]
    for piece in pieces:
        if not 0 < piece.position < max_length:  # nothing predicts the first token of a row
            continue
        term, place = (SPECIAL if piece.special else piece.owner), 0
        if term >= 0:
            term = numbering.get(term, CUT)
        if term >= 0:
            members[term].append(len(targets))
            place = len(members[term])
        targets.append(Target(piece.position, piece.start, piece.end, term, place))
    return AlignedRow(
        number,
        [int(token) for token in input_ids[:max_length]],
        [int(label) for label in labels[:max_length]],
        text[: max((target.end for target in targets), default=0)],
        targets,
        [Term(text[slice(*spans[old])], tuple(members[new])) for old, new in numbering.items()],
        seams.shared,
        seams.overhanging,
        sum(index in seams.touched and not own for index, own in enumerate(owned)),
    )


def _supervised_text(input_ids: list[Any], labels: list[int], specials: set[int]) -> tuple[str, list[_Piece]]:
    """The answers of a row in one text, and their tokens with offsets into it."""
    text = ""
    pieces: list[_Piece] = []

    def source(position: int) -> int | None:
        """The token's text; -1 if unsupervised, None if not cut out of a text (an added end)."""
        if labels[position] == IGNORE_INDEX:
            return -1
        return id(input_ids[position].text) if isinstance(input_ids[position], LocatedToken) else None

    for key, positions in itertools.groupby(range(len(labels)), source):
        if key == -1:
            continue
        stretch = list(positions)
        # A token that the tokenizer adds itself, such as the first, has the empty range 0, 0.
        tokens = [] if key is None else [input_ids[position] for position in stretch]
        located = [token for token in tokens if token.end > token.start]
        if not located:
            pieces += [_Piece(position, len(text), len(text), True) for position in stretch]
            continue
        begin, end = min(token.start for token in located), max(token.end for token in located)
        text += GAP if text else ""
        shift = len(text) - begin
        text += located[0].text[begin:end]
        last = begin + shift
        for position in stretch:
            token = input_ids[position]
            # White space has an empty range too, where a tokenizer trims its offsets.
            first, last = (token.start + shift, token.end + shift) if token.end > token.start else (last, last)
            pieces.append(_Piece(position, first, last, int(token) in specials))
    return text, pieces


def _terms_between_specials(text: str, pieces: list[_Piece], terms_of: Callable[[str], list[Span]]) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for first, last in [*((p.start, p.end) for p in pieces if p.special and p.end > p.start), (len(text), len(text))]:
        spans += [(start + begin, start + end) for begin, end in terms_of(text[start:first])]
        start = last
    return spans


@dataclass
class _Seams:
    """Counts of places, within the maximal length, where tokens and terms do not end together."""

    shared: int = 0
    overhanging: int = 0
    touched: set[int] = field(default_factory=set)  # terms with a token, even one that counts for another term


def _find_owners(text: str, pieces: list[_Piece], spans: list[Span], max_length: int) -> _Seams:
    """Give each token to the term with most of its characters; of equal terms, to the first."""
    seams, first = _Seams(), 0
    for piece in pieces:
        if piece.special or piece.start == piece.end:
            continue
        while first < len(spans) and spans[first][1] <= piece.start:
            first += 1
        overlaps = {}
        for index in range(first, len(spans)):
            start, end = spans[index]
            if start >= piece.end:
                break
            overlaps[index] = min(end, piece.end) - max(start, piece.start)
        if overlaps:
            piece.owner = max(overlaps, key=lambda index: overlaps[index])
        if piece.position < max_length:
            seams.shared += len(overlaps) > 1
            characters = sum(not character.isspace() for character in text[piece.start : piece.end])
            seams.overhanging += bool(overlaps) and sum(overlaps.values()) < characters
            seams.touched |= overlaps.keys()
    return seams
