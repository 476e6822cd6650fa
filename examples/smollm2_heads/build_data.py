"""Build the data of the SmolLM2 heads: functions of the standard library and of packages, and prompts for self-distillation.

    pip install -e '.[heads-data]'
    python examples/smollm2_heads/build_data.py OUTPUT_FOLDER [--seed 0]

writes ``functions_train.jsonl``, ``functions_test.jsonl`` and ``functions_packages.jsonl`` (rows ``{"text", "name",
"module"}``), ``prompts_train.jsonl`` and ``prompts_test.jsonl`` (rows ``{"prompt", "source"}``), and
``data.provenance.json``.

The same Python and the same reasoning-gym give the same bytes. Another Python version has another standard library, and
so other functions, but what is held out stays apart: no function trained on in one of 3.10 to 3.13 is a test function in
another. Functions of packages are for training alone; one that is also in the standard library is left out. Nothing of a
benchmark goes in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from instruction_prompts import make_prompts
from stdlib_functions import Function, package_functions, stdlib_functions

from peft_caft.basics.files import file_sha256, write_text
from peft_caft.basics.provenance import listed, provenance
from peft_caft.basics.tables import markdown_table

# Installed with '.[heads-data]', under Apache-2.0, BSD or MIT, and written by many hands.
PACKAGES = (
    "accelerate", "click", "datasets", "fsspec", "huggingface_hub", "jinja2", "networkx", "peft", "PIL", "pydantic",
    "pygments", "rich",
)  # fmt: skip
DISTRIBUTIONS = {"PIL": "pillow"}


def build(
    folder: str | Path, seed: int = 0, train_prompts: int = 6000, test_prompts: int = 300, max_files: int | None = None
) -> dict:
    """Write the five files and their provenance into ``folder``, and return the provenance."""
    folder = Path(folder)
    functions = stdlib_functions(max_files=max_files)
    of_packages = package_functions(PACKAGES, functions, max_files)
    prompts = make_prompts(functions, {"train": train_prompts, "test": test_prompts}, seed)
    contents = {
        "functions_train.jsonl": _rows(f for f in functions if not f.test),
        "functions_test.jsonl": _rows(f for f in functions if f.test),
        "functions_packages.jsonl": _rows(of_packages),
    } | {f"prompts_{split}.jsonl": rows for split, rows in prompts.items()}
    described = {}
    for name, rows in contents.items():
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        described[name] = {
            "rows": len(rows),
            "characters": sum(len(row.get("text", row.get("prompt", ""))) for row in rows),
            "sha256": file_sha256(folder / name),
        }
        if name.startswith("prompts"):
            described[name]["sources"] = dict(sorted(Counter(row["source"].split(":")[0] for row in rows).items()))
        else:
            described[name]["modules"] = sorted({row["module"].split(".")[0] for row in rows})
    record = {
        **provenance(),
        "command": shlex.join(["build_data.py", *(Path(argument).name for argument in sys.argv[1:])]),
        "seed": seed,
        "reasoning_gym": version("reasoning-gym"),
        "packages": {name: version(DISTRIBUTIONS.get(name, name)) for name in PACKAGES},
        "note": "functions are those of the standard library of this Python version; another has others",
        "files": described,
    }
    write_text(folder / "data.provenance.json", json.dumps(record, indent=2) + "\n")
    # `peft-caft train-heads` looks for one beside each file.
    of_stdlib = f"the standard library of Python {platform.python_version()}"
    sources = {
        "functions_train.jsonl": of_stdlib,
        "functions_test.jsonl": of_stdlib,
        "functions_packages.jsonl": listed(record["packages"]),
    }
    for name, source in sources.items():
        what = f"functions with a docstring of {source}"
        beside = {"what": what, "command": record["command"], "module_files": len(described[name]["modules"])}
        write_text((folder / name).with_suffix(".provenance.json"), json.dumps(beside, indent=2) + "\n")
    return record


def _rows(functions: Iterable[Function]) -> list[dict[str, str]]:
    """In an order that has nothing to do with modules, so that the first rows stand for all."""
    mixed = sorted(functions, key=lambda f: hashlib.sha256(f.source.encode()).digest())
    return [{"text": f.source, "name": f.name, "module": f.module} for f in mixed]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the data of the SmolLM2 heads.")
    parser.add_argument("folder", type=Path, metavar="OUTPUT_FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-prompts", type=int, default=6000)
    parser.add_argument("--test-prompts", type=int, default=300)
    arguments = parser.parse_args()
    record = build(arguments.folder, arguments.seed, arguments.train_prompts, arguments.test_prompts)
    rows = [
        [name, f"{file['rows']:,}", f"{file['characters']:,}", file["sha256"][:12]]
        for name, file in record["files"].items()
    ]
    print(markdown_table(["file", "rows", "characters", "sha256"], rows))


if __name__ == "__main__":
    main()
