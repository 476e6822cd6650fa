"""Terms of a text by the rules of its language, whatever a tokenizer makes of them.

- **prose**: words, by Unicode's default word boundaries (UAX #29): "don't", "3.14" and "snake_case"
  are one term, "well-known" is two, and each Chinese character is one. Punctuation is no term.
- **code**: identifiers, keywords, numbers and operators, and the words in strings and comments. An
  identifier such as ``max_row_count`` is one term. Brackets, commas, colons and dots are
  punctuation. Python's own tokenizer cuts what parses as Python; a regular expression, which cannot
  tell strings from code, cuts the rest. Around fenced blocks the text is prose.
- **chemistry**: in SMILES, bracket atoms (with their ring closures) and *fragments*, the longest
  runs of atoms, bonds and ring closures without a branch, such as ``c1ccccc1`` or ``=O``. Atoms, as
  Schwaller et al. cut them (arXiv 1811.02633), are too small: most subword tokens are one atom or
  several. Parentheses and dots are punctuation. In a name or a sentence, runs of letters:
  ``propan``, ``ol`` in 2-methylpropan-2-ol; locants are no terms.
"""

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence

import regex  # for \p{...} and UAX #29; transformers requires it

Span = tuple[int, int]  # half-open range of characters

SEGMENT = regex.compile(r"(?w).(?:\B.)*", regex.DOTALL)
WORD_CHARACTER = regex.compile(r"[\p{L}\p{N}]")
NAME_OR_WORD = regex.compile(r"[\w\p{M}]+")
LETTERS = regex.compile(r"[\p{L}\p{M}]+")
FENCED = re.compile(r"^```[^\n`]*\n(.*?)(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
LEXEME = regex.compile(
    r"""[\p{L}_$][\w\p{M}$]*                             # identifier or keyword
    | 0[xXbBoO][0-9a-fA-F_]+ | \d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?\w*
    | [-+*/%=<>!&|^~?@]+                                # operator""",
    regex.VERBOSE,
)
DELIMITERS = set("()[]{},:;.")
ESCAPE = re.compile(r"\\.", re.DOTALL)
BRACKET_ATOM = r"\[[^\[\]\s]+\]"
ATOM = r"Br|Cl|[BCNOSPFIbcnosp*]"
RING_CLOSURE = r"%\d\d|\d"
SMILES = re.compile(rf"(?:{BRACKET_ATOM}|{ATOM}|{RING_CLOSURE}|[-=#$:~/\\+.()])+")
FRAGMENT = re.compile(rf"{BRACKET_ATOM}(?:{RING_CLOSURE})*|(?:{ATOM}|{RING_CLOSURE}|[-=#$:~/\\+])+")
LOCANT = re.compile(r"(?:^|[\s(\[-])\d+'*(?:,\d+'*)*-[A-Za-z(\[]")
CODE_LINE = re.compile(
    r"[;{}]\s*$|^\s*(?:def|class|import|from|return|function|const|let|var|public|private|static|void|int|elif|else:|try:|#include"
    r"|if\s*\(|for\s*\(|while\s*\(|SELECT|fn|func)\b"
)


def prose_terms(text: str) -> list[Span]:
    """Words of ``text``, in order."""
    return [match.span() for match in SEGMENT.finditer(text) if WORD_CHARACTER.search(match.group())]


def code_terms(text: str) -> list[Span]:
    """Terms of source code, or of an answer with fenced blocks of it, in order."""
    blocks = [match.span(1) for match in FENCED.finditer(text)]
    if not blocks:
        return _code_of_one_language(text)
    spans: list[Span] = []
    end = 0
    for start, stop in [*blocks, (len(text), len(text))]:
        for part, (first, last) in ((prose_terms, (end, start)), (_code_of_one_language, (start, stop))):
            spans += _moved(part(text[first:last]), first)
        end = stop
    return spans


def chemistry_terms(text: str) -> list[Span]:
    """Bracket atoms and fragments of SMILES, and runs of letters elsewhere, in order."""
    spans: list[Span] = []
    for word in re.finditer(r"\S+", text):
        pattern = FRAGMENT if is_smiles(word.group()) else LETTERS
        spans += _moved([match.span() for match in pattern.finditer(word.group())], word.start())
    return spans


UNITS: dict[str, Callable[[str], list[Span]]] = {
    "prose": prose_terms,
    "code": code_terms,
    "chemistry": chemistry_terms,
}


def is_smiles(word: str) -> bool:
    """Whether ``word``, without white space, is a SMILES and no English word such as "no"."""
    if SMILES.fullmatch(word) is None or not re.search(r"[A-Za-z]", word):
        return False
    return bool(re.search(r"[\[\]()=#/\\%\d]", word)) or re.fullmatch(r"(?:Br|Cl|[BCNOSPFI])+", word) is not None


def guess_unit(texts: Sequence[str]) -> str:
    """Guess the unit: chemistry or code if more than half of the answers look like it, else prose.

    Chemistry: most characters are in SMILES of some structure, or there is a locant, as in
    ``2-methyl``. Code: a fenced block, Python that does something, or a third of code-like lines.
    """
    votes = [(_looks_like_chemistry(text), _looks_like_code(text)) for text in texts]
    if sum(chemistry for chemistry, _ in votes) * 2 > len(votes):
        return "chemistry"
    return "code" if sum(code for _, code in votes) * 2 > len(votes) else "prose"


def _looks_like_chemistry(text: str) -> bool:
    words = text.split()
    smiles = sum(len(word) for word in words if is_smiles(word) and not word.isdecimal() and len(word) > 2)
    return smiles * 2 > sum(map(len, words)) or (len(words) < 30 and LOCANT.search(text) is not None)


def _looks_like_code(text: str) -> bool:
    if FENCED.search(text):
        return True
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and sum(bool(CODE_LINE.search(line)) for line in lines) * 3 > len(lines):
        return True
    tree = _parsed(text)
    return tree is not None and any(not isinstance(s, ast.Expr) or isinstance(s.value, ast.Call) for s in tree.body)


def _moved(spans: list[Span], by: int) -> list[Span]:
    return [(start + by, end + by) for start, end in spans]


def _code_of_one_language(text: str) -> list[Span]:
    if _parsed(text) is not None:
        try:
            return list(_python_terms(text))
        except (tokenize.TokenError, SyntaxError, _Misplaced):
            pass
    return [match.span() for match in LEXEME.finditer(text)]


def _parsed(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in strings
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: null bytes
        return None


class _Misplaced(Exception):
    """The tokenizer gives a wrong position, such as after a form feed or a lone carriage return."""


def _python_terms(text: str) -> Iterator[Span]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP):
            if text[start:end] != token.string:
                raise _Misplaced
            if token.string not in DELIMITERS:
                yield start, end
        elif token.type not in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            # Strings and comments, whose prefix (r"...") and escapes (\n) are no words.
            source = text[start:end]
            prefix = re.match(r"[A-Za-z]*(?=['\"])", source)
            skipped = prefix.end() if prefix else 0
            plain = ESCAPE.sub(lambda match: " " * len(match.group()), source[skipped:])
            yield from _moved([match.span() for match in NAME_OR_WORD.finditer(plain)], start + skipped)
