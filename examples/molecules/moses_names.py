"""MOSES molecules with their IUPAC names, which openclatura works out: unlimited pairs of name and SMILES.

MOSES (Polykhovskiy et al. 2020) is a cleaned part of ZINC, small drug-like molecules without stereochemistry. Its files come inside the
package molsets, which is read and not imported: importing it needs packages that no longer build.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from peft_caft.basics.files import lock
from peft_caft.demo.molecules import MAX_NAME_LENGTH, MAX_SMILES_LENGTH, Molecule, canonical_smiles

FILES = {"train": "train.csv.gz", "test": "test.csv.gz"}  # never test_scaffolds.csv.gz, which stays unseen


def moses_folder() -> Path:
    """Where molsets keeps its data.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec("moses")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'moses'", name="molsets")
    return Path(spec.submodule_search_locations[0]) / "dataset" / "data"


@functools.cache
def moses_smiles(part: str) -> list[str]:
    """The SMILES of ``"train"`` or ``"test"``, mixed in a way that has nothing to do with the molecules."""
    with gzip.open(moses_folder() / FILES[part], "rt", encoding="utf-8") as file:
        smiles = file.read().split()[1:]
    return sorted(smiles, key=lambda s: hashlib.md5(s.encode(), usedforsecurity=False).digest())


class NameCache:
    """Names that were worked out before, one line of JSON each, so that an interrupted build loses none.

    Args:
        folder: where the file is, which names openclatura's version.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"moses-names-openclatura{version('openclatura')}.jsonl"
        self._file = open(self.path, "ab+")  # noqa: SIM115
        lock(self._file, self.path)
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)  # a line that a killed build left without its end
        self._names: dict[str, str | None] = {}
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            pair = json.loads(line)
            self._names[pair["smiles"]] = pair["name"]

    def __enter__(self) -> NameCache:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def name(self, smiles: str) -> str | None:
        """The name, or None where openclatura has none, or one that it cannot read back itself."""
        if smiles not in self._names:
            from openclatura import name

            result = name(smiles)
            self._names[smiles] = result.name if result.ok and result.name else None
            self._file.write((json.dumps({"smiles": smiles, "name": self._names[smiles]}) + "\n").encode())
            self._file.flush()
        return self._names[smiles]


def named_molecules(part: str, wanted: Callable[[str], bool], cache: NameCache) -> Iterator[Molecule]:
    """The molecules of a part of MOSES that are wanted and have a usable name.

    Args:
        part: ``"train"`` or ``"test"``.
        wanted: whether a canonical SMILES belongs to the split.
    """
    for smiles in moses_smiles(part):
        canonical = canonical_smiles(smiles)
        if canonical is None or len(canonical) > MAX_SMILES_LENGTH or not wanted(canonical):
            continue
        name = cache.name(canonical)
        if name is not None and len(name) <= MAX_NAME_LENGTH and name.isascii() and name.isprintable():
            yield Molecule(name, canonical, f"moses-{part}", 2018)
