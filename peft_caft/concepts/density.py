"""How dense a data set is in concepts: into how many tokens a tokenizer cuts its terms, and the n
that this suggests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from .alignment import BETWEEN, CUT, SPECIAL, AlignedRow

COVERED_SHARE = 0.9  # of the tokens in terms of several tokens, which n should reach to the end of
LEAST_N = 2
REPEATED_PIECE = "\N{MIDDLE DOT}"  # shown for a token that is a further part of one character


@dataclass(frozen=True)
class FrequentTerm:
    """A term of several tokens; ``pieces`` is its most frequent cut, and ``count`` counts all of
    its cuts.
    """

    text: str
    pieces: list[str]
    count: int


@dataclass(frozen=True)
class RecommendedN:
    """What `recommended_n` found.

    Attributes:
        n: tokens to predict at once: the model's own next one and n - 1 auxiliary heads.
        length: of terms, that covers `COVERED_SHARE` of the tokens in terms of several tokens; None
            if there is no such term.
        covered: share of those tokens that are in terms of at most n tokens; None likewise.
        most: what the heads offer.
        reason: in a sentence or two.
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
        between, special, cut: targets in no term: punctuation and white space; special tokens;
            parts of a term that the maximal length cut off.
        shared_tokens: targets that cover characters of several terms, and are counted for one of
            them.
        overhanging_tokens: targets in a term that also cover punctuation beside it, which its
            probability then includes.
        swallowed_terms: terms whose tokens all count for a neighbour; they are in no other figure.
        frequent: most frequent terms of several tokens, most frequent first.
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
        """Targets that are not the first of their term."""
        return sum((length - 1) * count for length, count in self.terms.items())

    def covered(self, n: int) -> float | None:
        """Share of the tokens in terms of several tokens that are in terms of at most ``n``."""
        total = self.multi_token_tokens
        return sum(self.tokens_in(length) for length in self.terms if 1 < length <= n) / total if total else None


def density(rows: list[AlignedRow], frequent: int = 20) -> Density:
    """Count the terms of aligned rows.

    Args:
        rows: as `peft_caft.concepts.alignment.align` gives them.
        frequent: how many frequent terms to list.
    """
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
    """What to show for each of some neighbouring tokens, so that together they are the text once.

    A character that is cut into several tokens is shown for the first of them.
    """
    shown, end = [], -1
    for target in (row.targets[index] for index in targets):
        text = row.text[max(target.start, end) : target.end]
        shown.append(text or (REPEATED_PIECE if target.end > target.start else ""))
        end = max(end, target.end)
    return shown


def recommended_n(found: Density, most: int = 5) -> RecommendedN:
    """A rule of thumb for n: enough to see to the end of most terms from just before their first
    token.

    From the position before a term of n tokens, the model and its n - 1 auxiliary heads predict all
    of it. So n is the least length for which `COVERED_SHARE` of the tokens in terms of several
    tokens lie in terms of at most that length; at least 2, and at most what the heads offer.
    Nothing here has been trained: whether this n is the best one for a task is another question.

    Args:
        found: of the data.
        most: n of the heads that there are; 5 for the usual four auxiliary heads.
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
