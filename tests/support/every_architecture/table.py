"""Writes docs/architectures.md anew: what CAFT does with every class that transformers knows.

python -m tests.support.every_architecture.table
"""

from __future__ import annotations

import logging
import re
import warnings

import torch
import transformers

from peft_caft.heads.config import HEAD_TYPES

from ..places import ROOT
from .oracle import EQUAL, FAULT, IMAGES, MODEL_TYPES, NO_IMAGE, REFUSED, TEXT, VISION, Outcome, outcome

PAGE = ROOT / "docs" / "architectures.md"
INPUTS = {TEXT: "text", VISION: "images: text alone", IMAGES: "images: with an image"}
TABLE = re.compile(r"(<!-- every architecture -->\n).*?(\n<!-- end -->)", re.DOTALL)
HEADER = "| {} | input | model types of transformers " + transformers.__version__ + " |\n|---|---|---|"


def summary(kind: str, model_type: str) -> str:
    """What CAFT does with both types of heads, in words that are the same for all classes of a kind."""
    outcomes = [outcome(kind, model_type, head_type) for head_type in HEAD_TYPES]
    for got in outcomes:
        if got.kind == FAULT:
            raise AssertionError(f"{kind} {model_type}: {got.detail}")
    residual, layers = outcomes
    if residual.kind == layers.kind == EQUAL:
        return "equal to the reference"
    if residual.kind == EQUAL:
        return f"equal with residual heads; decoder_layer: {layers.kind}: {reason(layers)}"
    return residual.kind if residual.kind == NO_IMAGE else f"{residual.kind}: {reason(residual)}"


def reason(got: Outcome) -> str:
    """The first sentence of the message, without names of one class, so that classes share a row."""
    text = re.sub(r" \(\w+\.py, line \d+\)$", "", got.detail)
    text = re.sub(r" \(\w*(Error|Exception): .*\)", "", text)
    text = re.sub(r"^\w+: ", "", text)
    if got.kind == REFUSED:
        text = re.sub(r"^(\w+: )?(got )?", "", text)
        text = re.sub(r"\b[A-Z]\w*(For[A-Z]\w+|HeadModel|WithLMHead|Model|_V3|Decoder)\b", "the class", text)
        text = re.sub(r"^the class,? (which )?", "", text)
    return re.split(r"\. |\.$|; |, expected a model", text)[0][:160].replace("|", "/")


def table(found: dict[str, dict[str, str]]) -> str:
    """``found[input][model type]`` is a `summary`; inputs with which the same classes do the same share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for words in dict.fromkeys(words for of_types in found.values() for words in of_types.values()):
        for kind, of_types in found.items():
            if names := ", ".join(name for name, said in of_types.items() if said == words):
                rows.setdefault((words, names), []).append(kind)
    order = sorted(rows, key=lambda row: (not row[0].startswith(EQUAL), row[0], list(INPUTS).index(rows[row][0])))
    lines = [f"| {row[0]} | {'; '.join(INPUTS[kind] for kind in rows[row])} | {row[1]} |" for row in order]
    return "\n".join([HEADER.format("with CAFT"), *lines])


def shown() -> dict[str, dict[str, str]]:
    """What the page says, as `table` takes it."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in INPUTS}
    match = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert match is not None
    for line in match[0].splitlines()[3:-1]:
        words, inputs, names = line.strip("| ").split(" | ")
        for kind, said in INPUTS.items():
            if said in inputs.split("; "):
                found[kind] |= dict.fromkeys(names.split(", "), words)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {kind: {name: summary(kind, name) for name in MODEL_TYPES[kind]} for kind in INPUTS}
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table(found) + match[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
