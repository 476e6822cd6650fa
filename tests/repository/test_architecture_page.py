"""docs/architecture.md names rooms, files and functions that exist, and draws the floors of the contract."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from ..support.places import ROOT

PACKAGE = ROOT / "peft_caft"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TEXT = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
FLOORS = json.loads(
    re.search(r'containers = \["peft_caft"\]\nlayers = (\[.*\])', (ROOT / "pyproject.toml").read_text())[1]
)
ROOMS = {room for floor in FLOORS for room in floor.split(" | ")}
BLOCKS = [block for block in re.split(r"\n(?=\n|\||- |\d+\. )", TEXT) if "`" in block]


def find(name: str) -> Path | None:
    return next((path for path in (PACKAGE / name, ROOT / name) if path.exists()), None)


@cache
def names_in(path: Path) -> set[str]:
    """What a file defines, and ``Class.member`` for what a class itself defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for owner, item in [("", node), *((f"{node.name}.", member) for member in members)]:
            targets = [*getattr(item, "targets", []), getattr(item, "target", None)]
            found |= {owner + name.id for name in targets if isinstance(name, ast.Name)}
            found |= {owner + item.name} if hasattr(item, "name") else set()
    return found | {name.rpartition(".")[2] for name in found}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip()[:40])
def test_files_exist_and_define_the_names_beside_them(block):
    spans = set(re.findall(r"`([^`\n]+)`", block))
    files = {span for span in spans if ("/" in span and " " not in span) or span == "pyproject.toml"}
    assert [name for name in files if find(name) is None] == []
    defined = set().union(*(names_in(find(name)) for name in files if name.endswith(".py")))
    names = {span for span in spans - files - ROOMS - {"peft_caft"} if re.fullmatch(r"\w+(\.\w+)?", span)}
    assert names - defined == set()


def test_the_picture_has_the_floors_of_the_contract():
    chain = next(line for line in PAGE.splitlines() if line.count("-->") > 1).split("-->")
    assert [floor.replace("&", "|").strip() for floor in chain] == FLOORS
    assert set(re.findall(r'^    (\w+)\["<b>\1</b>', PAGE, re.MULTILINE)) == ROOMS
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == ROOMS


def test_the_table_says_what_each_room_may_import():
    for room, allowed in re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", PAGE, re.MULTILINE):
        if allowed.startswith("`"):
            height = next(i for i, floor in enumerate(FLOORS) if room in floor.split(" | "))
            below = {name for floor in FLOORS[height + 1 :] for name in floor.split(" | ")}
            assert set(re.findall(r"`(\w+)`", allowed)) == below, room
