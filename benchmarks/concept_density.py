"""How dense SMILES, Python functions and docstrings are in terms of several tokens, and where SmolLM2's loss sits in them.

    PYTHONPATH=examples/smollm2_heads python benchmarks/concept_density.py --output benchmarks/concept_density

Terms are counted over ``--rows`` rows of each, and the model is scored on the first ``--scored-rows`` of them: held-out molecules
(`peft_caft.demo.molecules`), and functions of the standard library and their docstrings, in a fixed random order. Another Python has
another library, and so slightly other figures.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from stdlib_functions import Function, stdlib_functions

from peft_caft.basics.files import write_text
from peft_caft.basics.tables import markdown_table
from peft_caft.concepts.concepts import concepts
from peft_caft.concepts.findings import Concepts
from peft_caft.concepts.report import report
from peft_caft.concepts.settings import ConceptsSettings
from peft_caft.demo.molecules import write_dataset
from peft_caft.hub.embedded_model import embedded_model

UNITS = {"molecules": "chemistry", "functions": "code", "docstrings": "prose"}
SHORTEST_DOCSTRING = 120  # characters; shorter ones are hardly prose


def write_data(folder: Path, rows: int) -> dict[str, Path]:
    """The three data files."""
    write_dataset(folder / "all")
    molecules = (folder / "all" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    functions = sorted(stdlib_functions(), key=lambda f: hashlib.sha256(f.source.encode()).digest())
    told = [function for function in functions if len(function.docstring) > SHORTEST_DOCSTRING]
    lines = {
        "molecules": molecules,
        "functions": [json.dumps(_chat(f"Write the function.\n{_head(f)}", f.source)) for f in functions[:rows]],
        "docstrings": [
            json.dumps(_chat(f"What does this function do?\n{_head(f)}", f.docstring)) for f in told[:rows]
        ],
    }
    files = {name: folder / f"{name}.jsonl" for name in lines}
    for name, file in files.items():
        write_text(file, "\n".join(lines[name]) + "\n")
    return files


def _head(function: Function) -> str:
    return f"{function.name}({function.arguments})"


def _chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def summary(counted: dict[str, Concepts], scored: dict[str, Concepts]) -> str:
    """One line for each data set."""
    rows = []
    for name, found in counted.items():
        density = found.density
        places = {line.place: line.cross_entropy.estimate for line in scored[name].models["base"].places}
        rows.append(
            [
                f"{name} ({found.unit})",
                f"{density.tokens:,}",
                f"{density.multi_token_tokens / density.tokens:.0%}",
                f"{density.continuing_tokens / density.tokens:.0%}",
                str(found.recommended.length),
                *(f"{places[place]:.2f}" for place in ("single", "1", "2", "3", "4", "5+")),
            ]
        )
    header = ["data (unit)", "supervised tokens", "in terms of several", "continue a term", "length for 90 %"]
    return markdown_table([*header, "one-token terms", "1st of several", "2nd", "3rd", "4th", "5th and later"], rows)


def main(
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    rows: Annotated[int, typer.Option(help="Rows of each data set.")] = 400,
    scored_rows: Annotated[int, typer.Option(help="Rows that the model is scored on.")] = 64,
) -> None:
    """Write ``table.md`` with one line for each data set, and what `peft-caft concepts` says of the scored rows of each."""
    model = str(embedded_model())
    counted, scored = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, file in write_data(Path(scratch), rows).items():
            common: dict[str, Any] = {"data": str(file), "model": model, "unit": UNITS[name], "plots": False}
            outputs = [f"{scratch}/{name}-{kind}" for kind in ("counted", "scored")]
            counted[name] = concepts(ConceptsSettings(output=outputs[0], loss=False, **common))
            scored[name] = concepts(ConceptsSettings(output=outputs[1], max_rows=scored_rows, batch_size=4, **common))
            write_text(output / f"{name}.md", report(scored[name]) + "\n")
    note = (
        f"{rows} rows of each; columns from the sixth on: cross entropy (nats/token) of SmolLM2-135M-Instruct, not fine-tuned, on "
        f"{scored_rows} rows, by the place of the token in its term. Length for 90 %: of terms that holds 90 % of the tokens in terms of "
        "several."
    )
    table = summary(counted, scored)
    write_text(output / "table.md", f"{table}\n\n{note}\n")
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
