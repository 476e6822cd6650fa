"""`Concepts` as Markdown tables, which a terminal shows as well."""

from ..basics.intervals import Estimate, shown, too_narrow_by
from ..basics.tables import markdown_table
from .findings import Concepts
from .losses import PLACE_NAMES, ModelComparison

LONGEST_SHOWN = 8  # tokens; longer terms share one line of the table
FEW_ROWS = 30
LONGEST_CELL = 60  # characters
SEPARATOR = " \N{BOX DRAWINGS LIGHT VERTICAL} "  # between tokens; an ordinary bar would end the cell of a table


def report(found: Concepts) -> str:
    """All tables, in the order of a reader's questions."""
    parts = [_title(found), _density(found), _recommended(found)]
    if found.density.frequent:
        parts.append(_frequent(found))
    parts += [_places(found), _whole_terms(found)] if found.models else []
    if found.models and found.density.rows < FEW_ROWS:
        parts.append(f"Only {found.density.rows} rows: intervals from fewer than {FEW_ROWS} rows are too narrow.")
    parts += [_comparison(comparison) for comparison in found.comparisons]
    if found.heads:
        parts.append(_heads(found))
    return "\n\n".join(parts)


def _title(found: Concepts) -> str:
    counts = found.density
    unit = f"{found.unit} (guessed from the answers; --unit sets it)" if found.unit_guessed else found.unit
    left_out = found.data["rows_without_supervised_tokens"]
    return (
        f"# Concepts in {found.data['file']}\n\nUnit: {unit}. {counts.rows:,} rows, {counts.tokens:,} supervised tokens, "
        f"{counts.term_count:,} terms."
        + (f" {left_out:,} rows have no supervised token within max_length." if left_out else "")
    )


def _density(found: Concepts) -> str:
    counts = found.density

    def line(name: str, terms: int | None, tokens: int) -> list[str]:
        columns = ["", ""] if terms is None else [f"{terms:,}", _share(terms, counts.term_count)]
        return [name, *columns, f"{tokens:,}", _share(tokens, counts.tokens)]

    longest = max(counts.terms, default=0)
    lengths = range(1, min(longest, LONGEST_SHOWN) + 1)
    rows = [line(str(length), counts.terms.get(length, 0), counts.tokens_in(length)) for length in lengths]
    longer = [length for length in counts.terms if length > LONGEST_SHOWN]
    if longer:
        terms, tokens = (sum(f(length) for length in longer) for f in (counts.terms.__getitem__, counts.tokens_in))
        rows.append(line(f"{LONGEST_SHOWN + 1} to {longest}", terms, tokens))
    rows += [line("between terms", None, counts.between), line("special tokens", None, counts.special)]
    if counts.cut:
        rows.append(line("cut off by max_length", None, counts.cut))
    return (
        f"## Density\n\n{markdown_table(['tokens in the term', 'terms', '', 'supervised tokens', ''], rows)}\n\n"
        f"{_share(counts.multi_token_tokens, counts.tokens)} of the supervised tokens lie in terms of several tokens, and "
        f"{_share(counts.continuing_tokens, counts.tokens)} continue a term.\n\nSeams: {counts.shared_tokens:,} tokens cover several terms, "
        f"and count for the one with most of their characters; {counts.swallowed_terms:,} terms are left with no token of their own, and "
        f"are not in the table; {counts.overhanging_tokens:,} tokens of terms also cover punctuation beside it."
    )


def _recommended(found: Concepts) -> str:
    choice = found.recommended
    return (
        f"## Recommended n: {choice.n} ({choice.n - 1} auxiliary head{'s' if choice.n > 2 else ''})\n\n{choice.reason} A rule of thumb "
        "about these data and this tokenizer; nothing was trained to find it."
    )


def _frequent(found: Concepts) -> str:
    rows = [
        [_cell(term.text), _cell(SEPARATOR.join(term.pieces)), f"{term.count:,}"] for term in found.density.frequent
    ]
    return f"## Most frequent terms of several tokens\n\n{markdown_table(['term', 'tokens', 'times'], rows)}"


def _places(found: Concepts) -> str:
    columns = [f"{name} (nats/token)" for name in found.models]
    header = ["place of the token", "tokens", *columns, "share of its loss", "top-1"]
    rows = []
    for lines in zip(*(model.places for model in found.models.values()), strict=True):
        first = lines[0]
        if first.tokens:
            share = "" if first.share_of_loss is None else f"{first.share_of_loss:.1%}"
            values = [_interval(line.cross_entropy) for line in lines]
            top1 = " / ".join(f"{line.accuracy.mean:.1%}" for line in lines if line.accuracy)
            rows.append([PLACE_NAMES[first.place], f"{first.tokens:,}", *values, share, top1])
    note = f" The share is the {next(iter(found.models))} model's; top-1 is in the order of the columns."
    return (
        "## Where the loss sits\n\nTeacher-forced cross entropy, with 95 % intervals over rows, and how often the token is the most "
        f"likely one.{note if len(columns) > 1 else ''}\n\n{markdown_table(header, rows)}"
    )


def _whole_terms(found: Concepts) -> str:
    header = ["tokens in the term", "terms"]
    header += [f"{name}: {what}" for name in found.models for what in ("log-probability", "whole term right")]
    rows = []
    for lines in zip(*(model.terms for model in found.models.values()), strict=True):
        if lines[0].terms:
            values = [
                text for line in lines for text in (_interval(line.log_probability), _interval(line.accuracy, True))
            ]
            rows.append([lines[0].length, f"{lines[0].terms:,}", *values])
    if not rows:
        return "## Whole terms\n\nNo term takes several tokens."
    return (
        "## Whole terms of several tokens\n\nMean log-probability of the whole term (nats), and share of terms whose tokens are all the "
        f"most likely ones, given the right ones before; 95 % intervals over rows.\n\n{markdown_table(header, rows)}"
    )


def _comparison(comparison: ModelComparison) -> str:
    places = [
        [PLACE_NAMES[place], *_judged(difference, less_is_better=True)]
        for place, difference in comparison.cross_entropy.items()
        if difference is not None
    ]
    lengths = [
        [length, *_judged(difference), *_judged(comparison.accuracy[length], percent=True)]
        for length, difference in comparison.log_probability.items()
        if difference is not None
    ]
    title = f"## {comparison.model} minus {comparison.reference}, paired by row"
    tables = [markdown_table(["place of the token", "cross entropy (nats/token)", ""], places)]
    if lengths:
        header = ["tokens in the term", "log-probability (nats)", "", "whole term right", ""]
        tables.append(markdown_table(header, lengths))
    note = "Better or worse: the 95 % interval leaves out 0, as one of twenty does by chance. "
    note += (
        "It is over rows, for these very weights: another seed of the same training can differ by more."
        if comparison.runs == 1
        else f"It is over rows and {comparison.runs} runs, paired in the order given; with so few runs it is too narrow by up to "
        f"{too_narrow_by(comparison.runs):.0%}."
    )
    return "\n\n".join([title, *tables, note])


def _heads(found: Concepts) -> str:
    rows, ignorant = [], []
    for head in found.heads:
        k, knows = str(head.tokens_ahead), head.below_unigram > 0
        rows.append([k, f"{head.cross_entropy:.3f}", f"{head.below_unigram:+.3f}", "" if knows else "NO"])
        ignorant += [] if knows else [k]
    advice = (
        f"Heads for {', '.join(ignorant)} tokens ahead know nothing of these data: guessing by frequency is as good. Adapt them: "
        "peft-caft train-heads --init-heads HEADS --targets hard."
        if ignorant
        else "All heads are better than guessing by frequency."
    )
    header = ["head (tokens ahead)", "cross entropy (nats/token)", "below the unigram entropy", "knows something"]
    return f"## Heads\n\n{markdown_table(header, rows)}\n\nUnigram entropy of these tokens: {found.unigram_entropy:.3f} nats/token. {advice}"


def _interval(estimate: Estimate | None, percent: bool = False, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    text = shown(estimate.mean, estimate.low, estimate.high, percent, "+" if signed else "")
    return text.replace("%", "") + " %" if percent else text


def _judged(difference: Estimate | None, percent: bool = False, less_is_better: bool = False) -> list[str]:
    verdict = "no clear difference"
    if difference is not None and difference.excludes_zero:
        verdict = "better" if (difference.mean < 0) == less_is_better else "worse"
    return [_interval(difference, percent, signed=True), verdict]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _cell(text: str) -> str:
    """Text of the data as Markdown code that ends neither the cell nor the table."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    shown = shown if len(shown) <= LONGEST_CELL else shown[: LONGEST_CELL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    fence, space = ("``", " ") if "`" in shown else ("`", "")
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")
