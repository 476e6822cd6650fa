"""Functions of Python's standard library that have a docstring, split into train and test by module; and of packages."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MAX_CHARACTERS = 1200
TEST_SHARE = 0.08
# Of some sixty numbers tried, the one whose held-out modules are many and of even size: no package rules the test split.
MODULE_SPLIT = "module-48"
LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Function:
    """One function or method.

    Attributes:
        source: its text, dedented, with decorators and docstring.
        name: qualified name inside the module, as ``Class.method``.
        module: dotted name, as ``email.message``.
        arguments: what stands between the parentheses.
        docstring: cleaned of its indentation.
        body: the code alone in a normal form, for finding duplicates.
        test: whether its top-level module belongs to the test split.
    """

    source: str
    name: str
    module: str
    arguments: str
    docstring: str
    body: str
    test: bool


def in_test(kind: str, key: str) -> bool:
    """Whether ``key`` is held out; a hash decides, so that neither the seed nor what else exists changes it."""
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < TEST_SHARE


def split_name(module: str) -> str:
    """The name that decides the split: ``_pydatetime`` of Python 3.12 is ``datetime`` of 3.11, so both get the same."""
    return re.sub(r"^(_py(?=\w)|_+)", "", module.split(".")[0])


def stdlib_functions(folder: str | Path | None = None, max_files: int | None = None) -> list[Function]:
    """Functions and methods with a docstring, without duplicates, in the order of path and line.

    Args:
        folder: what to read; None is the standard library of the running Python.
        max_files: read an evenly spaced choice of so many files, for a quick look.
    """
    return _functions_in(Path(folder or sysconfig.get_path("stdlib")), "", max_files, known=())


def package_functions(packages: Iterable[str], known: list[Function], max_files: int | None = None) -> list[Function]:
    """Functions and methods with a docstring of installed packages, without those whose code is in ``known``.

    Args:
        packages: names to import.
        known: such as `stdlib_functions` gives them; packages carry copies of some.
        max_files: as for `stdlib_functions`, per package.
    """
    found: list[Function] = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"package: got {package!r}, expected the folder of an installed one. Run pip install {package}."
            )
        folder = Path(spec.submodule_search_locations[0])
        found += _functions_in(folder, f"{package}.", max_files, [*known, *found])
    return found


def _functions_in(folder: Path, prefix: str, max_files: int | None, known: Iterable[Function]) -> list[Function]:
    relative = (path.relative_to(folder) for path in folder.rglob("*.py"))
    files = sorted(path.as_posix() for path in relative if not LEFT_OUT & set(path.parts))
    if max_files is not None:
        files = files[:: max(1, -(-len(files) // max_files))]
    found, seen = [], {text for function in known for text in (function.source, function.body)}
    for file in files:
        for function in _functions_of(folder / file, prefix + _module_name(file)):
            if function.source not in seen and function.body not in seen:
                found.append(function)
            seen |= {function.source, function.body}
    return found


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _functions_of(path: Path, module: str) -> Iterator[Function]:
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings are not our concern
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # a template, or an old file in another encoding
        return
    lines, test = text.splitlines(), in_test(MODULE_SPLIT, split_name(module))
    for node, name in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).strip()
        if docstring and len(source) <= MAX_CHARACTERS and _parses(source):
            body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
            yield Function(source, name, module, ast.unparse(node.args), docstring, body, test)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Functions in source order. Those inside another function are part of its text, and so not listed again."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
        else:
            yield from _definitions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def _parses(source: str) -> bool:
    # A docstring that starts at the margin keeps `dedent` from doing its work.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError:
        return False
    return True
