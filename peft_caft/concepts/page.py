"""``concepts.html``: the tokens of real answers, coloured by cross entropy, in one offline file.

No value is shown by colour alone: the bar under a token says the same, a check box writes the
numbers out, and the box around a term is dashed where the model gets a token wrong. In OKLCH equal
steps look equal, and lightness carries the value: colour-blind eyes and grey prints lose nothing.
"""

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby

import numpy as np

from .alignment import SPECIAL, AlignedRow
from .density import REPEATED_PIECE, pieces
from .findings import Concepts
from .token_scores import TokenScores

MOST_NATS = 6.0  # has full colour; a probability of 0.25 %
MOST_DIFFERENCE = 2.0  # nats, either way; has full colour
MOST_PLACES = 5  # place in a term that has full colour, where no model is scored
LONGEST_PROMPT = 400  # characters
NEWLINE = '<span class="sign">\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</span>\n'
ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: "\N{SYMBOL FOR DELETE}"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --paper: #ffffff; --faint: #57606a; --line: #d0d7de; --box: #57606a;
  --least: .985; --most: .70; --chroma: .15; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9aa4ae; --line: #30363d; --box: #9aa4ae;
  --least: .20; --most: .50; --chroma: .13; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; } h3 { font-size: .85rem; margin: .7rem 0 .1rem; color: var(--faint); }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
.note, .prompt { color: var(--faint); font-size: .9rem; max-width: 46rem; overflow-wrap: anywhere; } .prompt { white-space: pre-wrap; }
.tokens { font: 15px/2.1 ui-monospace, "DejaVu Sans Mono", monospace; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { --c: calc(var(--x)); color: var(--ink); padding: .15em 0 .28em; border-left: 1px solid var(--line); -webkit-box-decoration-break: clone;
  box-decoration-break: clone;
  background: linear-gradient(currentColor, currentColor) no-repeat left bottom / 100% calc(var(--c) * .26em),
  oklch(calc(var(--least) + (var(--most) - var(--least)) * var(--c)) calc(var(--chroma) * var(--c)) var(--hue, 55)); }
.worse { --hue: 40; } .better { --hue: 250; }
.better { background-position: left top, 0 0; }
.term { border: 1.5px solid var(--box); border-radius: .25em; padding: .22em 0 .34em; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.term > .t:first-child { border-left-color: transparent; }
.missed { border-style: dashed; }
.sign { color: var(--faint); }
body:has(#numbers:checked) .t::after { content: attr(data-v); font: .62em/1 system-ui, sans-serif; vertical-align: -.5em;
  padding: 0 .25em 0 .1em; }
body:has(#numbers:checked) .tokens { line-height: 2.6; }
label { display: inline-flex; gap: .4em; align-items: center; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .9rem; } td, th { text-align: left; padding: .15rem .9rem .15rem 0; }
@media (forced-colors: active) { .t { border-bottom: calc(var(--c) * 4px) solid; } }
"""


def page(
    found: Concepts,
    rows: Sequence[AlignedRow],
    prompts: Sequence[str],
    scores: dict[str, list[TokenScores]],
    token_name: Callable[[int], str],
) -> str:
    """The page as HTML.

    Args:
        found: findings that the head of the page sums up.
        rows: rows to show; ``prompts`` are theirs.
        scores: model -> scores of these rows in its first run; empty to colour the place in a term.
        token_name: gives the name of a token id, for tokens without text.
    """
    pairs = [(comparison.reference, comparison.model) for comparison in found.comparisons]
    articles = "\n".join(
        _article(row, prompt, {name: score[index] for name, score in scores.items()}, pairs, token_name)
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    )
    title = escape(f"Concepts in {found.data['file']}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n<h1>{title}</h1>\n{_head(found)}\n{articles}\n</main>\n</body>\n</html>\n"
    )


def _head(found: Concepts) -> str:
    counts = found.density
    share = counts.continuing_tokens / counts.tokens
    summary = (
        f"Unit: {escape(found.unit)}. {counts.rows:,} rows, {counts.tokens:,} supervised tokens, of which {share:.1%} continue a term. "
        f"Recommended n: {found.recommended.n}. {escape(found.recommended.reason)} A rule of thumb."
    )
    if found.models:
        legend = (
            f"Colour and bar: cross entropy of the token, from {_sample(0, '0')} by way of {_sample(0.5, f'{MOST_NATS / 2:g}')} to "
            f"{_sample(1, f'{MOST_NATS:g} nats')} and more. "
            'A box is a term of several tokens: <span class="term">whole</span> where all of them are the model\'s most likely ones, '
            '<span class="term missed">dashed</span> where not.'
        )
        if found.comparisons:
            legend += (
                f" In a difference of two models: {_sample(0.8, 'better', 'better')}, bar above, and {_sample(0.8, 'worse', 'worse')}, "
                f"bar below; full at {MOST_DIFFERENCE:g} nats, and all boxes are whole."
            )
    else:
        legend = (
            f"Colour and bar: place of the token in its term, from {_sample(0, '1st')} to {_sample(1, f'{MOST_PLACES}th')} and later. "
            'A box is a <span class="term">term of several tokens</span>. No model was asked (--no-loss).'
        )
    return (
        f'<p class="note">{summary}</p>\n<p class="note">{legend} Hover over a token for its figures.</p>\n'
        '<label><input type="checkbox" id="numbers"> Write the numbers beside the tokens</label>'
    )


def _sample(x: float, text: str, kind: str = "") -> str:
    return f'<span class="{f"t {kind}".strip()}" style="--x:{x:g}">&nbsp;{escape(text)}&nbsp;</span>'


def _article(
    row: AlignedRow,
    prompt: str,
    scores: dict[str, TokenScores],
    pairs: Sequence[tuple[str, str]],
    token_name: Callable[[int], str],
) -> str:
    parts = [f'<article>\n<h2 id="row-{row.number}">Row {row.number}</h2>']
    if prompt.strip():
        short = prompt if len(prompt) <= LONGEST_PROMPT else prompt[: LONGEST_PROMPT - 1] + "\N{HORIZONTAL ELLIPSIS}"
        parts.append(f'<p class="prompt" dir="auto">{_visible(short, newline=chr(10))}</p>')
    shown = _shown(row, token_name)
    if not scores:
        places = [min(max(target.place, 1) - 1, MOST_PLACES - 1) / (MOST_PLACES - 1) for target in row.targets]
        values = [str(target.place) if row.length_of(target) > 1 else "" for target in row.targets]
        parts.append(_line(row, shown, places, values, [""] * len(shown), None))
    for name, score in scores.items():
        losses = score.cross_entropy
        titles = [f"{loss:.2f} nats, probability {np.exp(-loss):.1%}" for loss in losses]
        parts.append(f"<h3>{escape(name)}: {losses.mean():.3f} nats/token</h3>")
        strengths = [min(1.0, loss / MOST_NATS) for loss in losses]
        parts.append(_line(row, shown, strengths, [f"{loss:.1f}" for loss in losses], titles, score.correct))
    for reference, name in pairs:
        change = scores[name].cross_entropy - scores[reference].cross_entropy
        parts.append(f"<h3>{escape(name)} minus {escape(reference)}: {change.mean():+.3f} nats/token</h3>")
        titles = [f"{value:+.2f} nats" for value in change]
        values = [f"{value:+.1f}" for value in change]
        parts.append(_line(row, shown, list(change / MOST_DIFFERENCE), values, titles, None))
    return "\n".join([*parts, "</article>"])


def _line(
    row: AlignedRow,
    shown: list[str],
    strengths: Sequence[float],
    values: Sequence[str],
    titles: Sequence[str],
    correct: np.ndarray | None,
) -> str:
    """Tokens of a row with boxes around terms; negative strengths are better than the reference."""
    tokens = []
    for index, (target, text) in enumerate(zip(row.targets, shown, strict=True)):
        strength = strengths[index]
        kind = "" if correct is not None or not titles[index] else " better" if strength < 0 else " worse"
        length = row.length_of(target)
        place = f"{ORDINALS.get(target.place, f'{target.place}th')} of {length} tokens" if length > 1 else ""
        title = escape("; ".join(part for part in (titles[index], place) if part))
        style = f"--x:{min(1.0, abs(strength)):.3f}"
        body = text.removesuffix("\n")  # the line ends after the number that may be written behind the token
        tokens.append(
            f'<span class="t{kind}" style="{style}" title="{title}" data-v="{values[index]}">{body}</span>{text[len(body) :]}'
        )
    lines = []
    for term, group in groupby(range(len(tokens)), lambda index: row.targets[index].term):
        indices = list(group)
        inner = "".join(tokens[index] for index in indices)
        if term >= 0 and len(row.terms[term].targets) > 1:
            missed = "" if correct is None or correct[indices].all() else " missed"
            inner = f'<span class="term{missed}">{inner}</span>'
        lines.append(inner)
    return f'<p class="tokens" dir="auto">{"".join(lines)}</p>'


def _shown(row: AlignedRow, token_name: Callable[[int], str]) -> list[str]:
    """HTML of each token; together they are the text, with the names of special tokens."""
    texts = pieces(row, tuple(range(len(row.targets))))
    shown, end = [], row.targets[0].start if row.targets else 0
    for target, text in zip(row.targets, texts, strict=True):
        if not text and target.term == SPECIAL:
            text = str(token_name(row.input_ids[target.position]))
        between = row.text[end : target.start]  # from one answer to the next, or space that no token covers
        shown.append(_visible(between) + _visible(text or REPEATED_PIECE))
        end = max(end, target.end)
    return shown


def _visible(text: str, newline: str = NEWLINE) -> str:
    """``text`` escaped, with symbols for control characters, most of which HTML forbids."""
    return escape(text.translate(PICTURES)).replace("\n", newline)
