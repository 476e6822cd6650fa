"""Builds the data of a task: a file per split, and ``data.json``, which describes them."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..basics.files import default_cache_dir, file_sha256, write_jsonl, write_text
from ..basics.provenance import git_commit, versions
from ..basics.tables import markdown_table
from .task import INSTALL, Row, Splits, Task, answer_of, prompt_of

RECORD_NAME = "data.json"


def build_task(
    task: Task, folder: str | Path, sizes: dict[str, int] | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Write ``SPLIT.jsonl`` for each split, and last ``data.json``, which marks a folder as whole.

    Args:
        folder: files of an earlier build in it are replaced.
        sizes: number of rows of each split; None takes the task's. A split of 0 rows is left out.
        cache: folder for what takes long to make; None takes `default_cache_dir`.

    Returns:
        the contents of ``data.json``.

    Raises:
        ValueError: if a split has too few rows, or two splits share a key.
    """
    wanted = {split: size for split, size in (task.sizes | (sizes or {})).items() if size}
    if unknown := sorted(set(wanted) - set(task.sizes)):
        raise ValueError(f"sizes: got split {unknown[0]!r}, expected one of {', '.join(task.sizes)}.")
    built = task.build(wanted, default_cache_dir() if cache is None else Path(cache))
    for split, size in wanted.items():
        if len(built.rows.get(split, [])) < size:
            raise ValueError(
                f"{split}: got {len(built.rows.get(split, [])):,} rows from the sources of {task.name!r}, expected {size:,}. Ask for "
                f"fewer with --{split}."
            )
    rows = {split: built.rows[split][:size] for split, size in wanted.items()}
    disjoint = require_disjoint(task, rows)
    return _write(task, Path(folder), Splits(rows, built.sources, built.notes), disjoint)


def require_disjoint(task: Task, splits: dict[str, list[Row]]) -> dict[str, dict[str, int]]:
    """Check that no two splits share a key of `Task.keys`, and no split holds a row twice.

    Returns:
        for each kind of key, the number of different values in each split.

    Raises:
        ValueError: if one is shared or a row is there twice, naming key, value and splits.
    """
    owner: dict[tuple[str, str], str] = {}
    distinct: dict[str, dict[str, int]] = {}
    for split, rows in splits.items():
        seen: set[tuple[str, str]] = set()
        for row in rows:
            whole = (prompt_of(row), answer_of(row))
            if whole in seen:
                raise ValueError(
                    f"{split}: the row with the prompt {whole[0]!r} is there twice, expected once. Mend {task.name}.build."
                )
            seen.add(whole)
            for kind, value in task.keys(row).items():
                first = owner.setdefault((kind, value), split)
                if first != split:
                    raise ValueError(
                        f"{kind}: {value!r} is in {first} and in {split}, expected it in one of them. Mend {task.name}.build, or results on "
                        f"{split} say nothing."
                    )
    for kind, value in owner:
        counts = distinct.setdefault(kind, dict.fromkeys(splits, 0))
        counts[owner[kind, value]] += 1
    return distinct


def _write(task: Task, folder: Path, built: Splits, disjoint: dict[str, dict[str, int]]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    files = {}
    for split, rows in built.rows.items():
        path = folder / f"{split}.jsonl"
        write_jsonl(path, rows)
        files[path.name] = {
            "rows": len(rows),
            "prompt_characters": sum(len(prompt_of(row)) for row in rows),
            "answer_characters": sum(len(answer_of(row)) for row in rows),
            "sha256": file_sha256(path),
        }
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    record = {
        "task": task.name,
        "files": files,
        "disjoint": disjoint,
        "sources": built.sources,
        **({"notes": built.notes} if built.notes else {}),
        "command": shlex.join([Path(sys.argv[0]).name, *arguments]),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_text(folder / RECORD_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def build_main(task: Task) -> None:
    """The command line of a task's file."""
    parser = argparse.ArgumentParser(
        description=f"Build the data of the task {task.name!r}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", default=argparse.SUPPRESS, help="folder to write"
    )
    for split, size in task.sizes.items():
        parser.add_argument(
            f"--{split}", type=int, default=size, metavar="ROWS", help=f"rows of {split}.jsonl; 0 leaves it out"
        )
    parser.add_argument("--cache", type=Path, default=default_cache_dir(), help="folder for what takes long to make")
    arguments = parser.parse_args()
    try:
        sizes = {split: getattr(arguments, split) for split in task.sizes}
        record = build_task(task, arguments.output, sizes, arguments.cache)
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")
    except ModuleNotFoundError as error:
        parser.exit(1, f"Error: {error.name!r} is not installed. {INSTALL}\n")
    print(markdown_table(*file_table(record)))
    for kind, counts in record["disjoint"].items():
        print(f"No {kind} is in two splits: " + ", ".join(f"{n:,} in {split}" for split, n in counts.items()))


def file_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of files that a build prints."""
    counts = ("rows", "prompt_characters", "answer_characters")
    rows = [
        [name, *(f"{file[count]:,}" for count in counts), file["sha256"][:12]]
        for name, file in record["files"].items()
    ]
    return ["file", "rows", "characters of prompts", "of answers", "sha256"], rows
