"""Into how many tokens a tokenizer cuts the terms of a data set, and the n that this suggests."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from ..heads.config import DEFAULT_NUM_HEADS
from .alignment import BETWEEN, CUT, SPECIAL, AlignedRow

COVERED_SHARE = 0.9  # share of the tokens in terms of several tokens that n should cover
LEAST_N = 2
USUAL_N = DEFAULT_NUM_HEADS + 1
REPEATED_PIECE = "\N{MIDDLE DOT}"  # shown for a token that is a further part of one character


@dataclass(frozen=True)
class FrequentTerm:
    """A term of several tokens, its most frequent cut, and how often it occurs, however cut."""

    text: str
    pieces: list[str]
    count: int


@dataclass(frozen=True)
class RecommendedN:
    """Result of `recommended_n`.

    Attributes:
        n: number of tokens to predict: the next one, and one per auxiliary head (n - 1).
        length: least n for `COVERED_SHARE`; None if no term has several tokens.
        covered: `Density.covered` of n.
        most: largest n that the heads offer.
        reason: one or two sentences for the report.
    """

    n: int
    length: int | None
    covered: float | None
    most: int
    reason: str


@dataclass(frozen=True)
class Density:
    """Counts over the targets of a data set (see `peft_caft.concepts.alignment`).

    Attributes:
        rows, tokens: rows with a target, and targets.
        terms: length in tokens -> number of terms.
        between, special, cut: targets of these kinds, which lie in no term.
        shared_tokens: targets that cover characters of several terms; each counts for one of them.
        overhanging_tokens: targets in a term that also cover punctuation beside it.
        swallowed_terms: terms whose tokens all count for a neighbour; no other figure counts them.
        frequent: the most frequent terms of several tokens, most frequent first.
    """

    rows: int
    tokens: int
    terms: dict[int, int]
    between: int
    special: int
    cut: int
    shared_tokens: int
    overhanging_tokens: int
    swallowed_terms: int
    frequent: list[FrequentTerm]

    @property
    def term_count(self) -> int:
        return sum(self.terms.values())

    def tokens_in(self, length: int) -> int:
        """Targets in terms of ``length`` tokens."""
        return self.terms.get(length, 0) * length

    @property
    def multi_token_tokens(self) -> int:
        """Targets in terms of two tokens or more."""
        return sum(self.tokens_in(length) for length in self.terms if length > 1)

    @property
    def continuing_tokens(self) -> int:
        """Targets that are not the first token of their term."""
        return sum((length - 1) * count for length, count in self.terms.items())

    def covered(self, n: int) -> float | None:
        """Share of `multi_token_tokens` in terms of at most ``n`` tokens; None if that is 0."""
        total = self.multi_token_tokens
        return sum(self.tokens_in(length) for length in self.terms if 1 < length <= n) / total if total else None


def density(rows: list[AlignedRow], frequent: int = 20) -> Density:
    """Count the terms, and list the most ``frequent`` ones of several tokens."""
    places = Counter(target.term for row in rows for target in row.targets if target.term < 0)
    lengths = Counter(len(term.targets) for row in rows for term in row.terms)
    cuts: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for row in rows:
        for term in row.terms:
            if len(term.targets) > 1:
                cuts[term.text][tuple(piece.strip() for piece in pieces(row, term.targets))] += 1
    totals = Counter({text: counts.total() for text, counts in cuts.items()})
    ranked = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:frequent]
    return Density(
        rows=len(rows),
        tokens=sum(len(row.targets) for row in rows),
        terms=dict(sorted(lengths.items())),
        between=places[BETWEEN],
        special=places[SPECIAL],
        cut=places[CUT],
        shared_tokens=sum(row.shared_tokens for row in rows),
        overhanging_tokens=sum(row.overhanging_tokens for row in rows),
        swallowed_terms=sum(row.swallowed_terms for row in rows),
        frequent=[FrequentTerm(text, list(cuts[text].most_common(1)[0][0]), count) for text, count in ranked],
    )


def pieces(row: AlignedRow, targets: tuple[int, ...]) -> list[str]:
    """Texts of neighbouring tokens; a character of several tokens is at the first of them."""
    shown, end = [], -1
    for target in (row.targets[index] for index in targets):
        text = row.text[max(target.start, end) : target.end]
        shown.append(text or (REPEATED_PIECE if target.end > target.start else ""))
        end = max(end, target.end)
    return shown


def recommended_n(found: Density, most: int = USUAL_N) -> RecommendedN:
    """A rule of thumb for n: most terms lie within reach of the position before them.

    From the position before a term of n tokens, the model and its n - 1 auxiliary heads predict all
    of it. So n is the least length for which `COVERED_SHARE` of the tokens in terms of several
    tokens lie in terms of at most that length; at least 2, and at most ``most``, what the heads
    offer. Nothing was trained to find it: another n may be better for a task.
    """
    lengths = [length for length in found.terms if length > 1 and (found.covered(length) or 0) >= COVERED_SHARE]
    if not lengths:
        return RecommendedN(
            LEAST_N, None, None, most, "No term takes several tokens, so n is the least that there is."
        )
    length = min(lengths)
    n = max(LEAST_N, min(length, most))
    covered = found.covered(n)
    reason = (
        f"{found.covered(length):.0%} of the tokens in terms of several tokens lie in terms of at most {length}, the least length for "
        f"{COVERED_SHARE:.0%}."
    )
    if n < length:
        reason += f" Heads for n = {most} (the usual ones, unless others were named) cover {covered:.0%}."
    return RecommendedN(n, length, covered, most, reason)
