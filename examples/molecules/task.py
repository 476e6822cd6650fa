"""IUPAC name -> SMILES: ``python task.py --output FOLDER``, then ``peft-caft evaluate --task task.py``. See README.md."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from moses_names import NameCache, moses_folder, named_molecules
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from peft_caft.demo.molecules import SYSTEM_PROMPT, Molecule, canonical_smiles, component_molecules
from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task, answer_of, chat, prompt_of, share_of_cut_words
from peft_caft.evaluation.task_building import build_main

SHARES = {"test": 0.07, "dev": 0.10}  # upper ends; a scaffold's number between 0 and 1 decides its split
# The first number tried with which the forty commonest scaffolds, such as benzene, are in train, where they can teach most.
SPLIT_NUMBER = "scaffold-39"
ROWS_PER_SCAFFOLD = 5  # in dev and test, so that none rules the result
LOCANT = re.compile(r"\d-|-\d")  # what a systematic name has, unlike "caffeine", which cannot be read but only known
FINGERPRINTS = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)


def scaffold_of(smiles: str) -> str:
    """The Bemis-Murcko scaffold without stereochemistry; of a molecule without rings, itself."""
    molecule = Chem.MolFromSmiles(smiles)
    Chem.RemoveStereochemistry(molecule)
    return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(molecule)) or Chem.MolToSmiles(molecule)


def split_of(smiles: str) -> str:
    """The split that a molecule belongs to for ever, as its scaffold does."""
    digest = hashlib.sha256(f"{SPLIT_NUMBER}:{scaffold_of(smiles)}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64
    return next((split for split, limit in SHARES.items() if number < limit), "train")


class Molecules(Task):
    """Half of the rows are components of the wwPDB dictionary, half MOSES molecules."""

    name = "molecules"
    metrics = (
        Metric("exact", "share of answers that are the molecule, stereochemistry included"),
        Metric("valid", "share of answers that RDKit reads as a molecule"),
        Metric("tanimoto", "Morgan similarity (radius 2, 2048 bits) of valid answers to the reference", "mean"),
    )
    sizes = {"train": 15_000, "dev": 500, "test": 1_000}  # noqa: RUF012
    max_new_tokens = 80

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        """Of two molecules with one name or one SMILES, the first is kept, and components come first."""
        rows: dict[str, list[Row]] = {}
        chosen = Chosen()
        with NameCache(cache) as names:  # opened first: what is missing is missed at once
            moses_folder()
            components = _components(cache)
            for split, size in sizes.items():
                limit = None if split == "train" else ROWS_PER_SCAFFOLD
                kept = list(chosen.new(components[split], limit, size // 2))
                part = "test" if split == "test" else "train"
                named = named_molecules(part, lambda s, own=split: split_of(s) == own, names)
                bar = tqdm(
                    chosen.new(named, limit, size - len(kept)),
                    total=size - len(kept),
                    desc=f"Naming MOSES molecules for {split}",
                    unit=" molecules",
                    smoothing=0,
                    mininterval=1,
                )
                kept += bar
                kept.sort(key=lambda m: hashlib.sha256(m.smiles.encode()).digest())
                rows[split] = [_row(molecule) for molecule in kept]
        sources = {
            "components": f"wwPDB chemical component dictionary in biotite {version('biotite')}, CC0; dated before 2024, names with a locant",
            "moses": f"MOSES train and test in molsets {version('molsets')}, MIT, named by openclatura {version('openclatura')}, MIT",
            "rdkit": version("rdkit"),
        }
        return Splits(
            rows, sources, {"scaffolds": "Bemis-Murcko, without stereochemistry; a hash of it decides the split"}
        )

    def keys(self, row: Row) -> dict[str, str]:
        return {
            "canonical SMILES": str(canonical_smiles(answer_of(row))),
            "scaffold": scaffold_of(answer_of(row)),
            "name": prompt_of(row).lower(),
        }

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        scores: Scores = {"exact": [], "valid": [], "tanimoto": []}
        for row, answer in zip(rows, answers, strict=True):
            reference, predicted = canonical_smiles(answer_of(row)), canonical_smiles(answer)
            scores["exact"].append(float(predicted is not None and predicted == reference))
            scores["valid"].append(float(predicted is not None))
            scores["tanimoto"].append(
                None if predicted is None or reference is None else _similarity(predicted, reference)
            )
        return scores

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {
            "words of the name in several tokens": share_of_cut_words(prompt_of(row), tokenizer),
            "source": row["source"],
        }


def _components(cache: Path) -> dict[str, list[Molecule]]:
    """Components with a systematic name, by split, in an order that has nothing to do with them."""
    found: dict[str, list[Molecule]] = {"train": [], "dev": [], "test": []}
    by_hash = sorted(component_molecules(cache), key=lambda m: hashlib.sha256(m.component.encode()).digest())
    for molecule in tqdm(by_hash, desc="Scaffolds of components", unit=" molecules", smoothing=0, mininterval=1):
        if LOCANT.search(molecule.name):
            found[split_of(molecule.smiles)].append(molecule)
    return found


class Chosen:
    """What is in some split already, by name and SMILES, and how often its scaffold."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.of_scaffold: Counter[str] = Counter()

    def new(self, molecules: Iterable[Molecule], per_scaffold: int | None, count: int) -> Iterator[Molecule]:
        """The first ``count`` molecules that are not there yet, at most so many of a scaffold; they are from now on."""
        if not count:
            return
        for molecule in molecules:
            keys = {molecule.name.lower(), molecule.smiles}
            scaffold = scaffold_of(molecule.smiles) if per_scaffold else ""
            if keys & self.keys or (per_scaffold and self.of_scaffold[scaffold] >= per_scaffold):
                continue
            self.keys |= keys
            self.of_scaffold[scaffold] += 1
            yield molecule
            count -= 1
            if not count:
                return


def _row(molecule: Molecule) -> Row:
    source = "MOSES" if molecule.component.startswith("moses") else "components"
    return chat(SYSTEM_PROMPT, molecule.name, molecule.smiles) | {"source": source}


def _similarity(first: str, second: str) -> float:
    bits = [FINGERPRINTS.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in (first, second)]
    return DataStructs.TanimotoSimilarity(*bits)


TASK = Molecules()

if __name__ == "__main__":
    build_main(TASK)
