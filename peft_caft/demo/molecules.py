"""Chemical name -> SMILES: a real task with long concepts (a ring is many tokens), and its metrics.

The pairs come from the wwPDB chemical component dictionary inside the PyPI package biotite: each
component has a name, atoms, bonds and coordinates, from which RDKit writes the SMILES.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rdkit
from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import rdFingerprintGenerator

from ..basics.files import default_cache_dir, write_jsonl
from ..evaluation.task import chat

FIRST_UNUSED_YEAR = 2024  # later components stay unseen
MAX_SMILES_LENGTH = 80  # characters
MAX_NAME_LENGTH = 150  # characters
CACHE_VERSION = 1  # raise it when the rules below change, so that no older cache is read
SPLITS = ("train", "dev", "test")
SYSTEM_PROMPT = "Write the SMILES of the named molecule."

# No metals: the dictionary draws coordination as covalent bonds, on which SMILES readers disagree.
ELEMENTS = {"B": 5, "C": 6, "N": 7, "O": 8, "F": 9, "SI": 14, "P": 15, "S": 16, "CL": 17, "SE": 34, "BR": 35, "I": 53}
HYDROGENS = {"H", "D"}
# These keep their capitals: (2R,3aS) and (E), locants such as N-, S- or L-, and 2H.
CAPITALS = re.compile(
    r"(?<=\()\d*'*[a-d]?[rsez](?:,\d*'*[a-d]?[rsez])*(?=\))|(?<![a-z])[nosdlr](?=\d*[-,'])|(?<=\d)h(?![a-z])"
)
BOND_TYPES = {"SING": Chem.BondType.SINGLE, "DOUB": Chem.BondType.DOUBLE, "TRIP": Chem.BondType.TRIPLE}


@dataclass(frozen=True)
class Molecule:
    """One component of the dictionary."""

    name: str  # cleaned, printable ASCII
    smiles: str  # RDKit's canonical SMILES, with stereochemistry
    component: str  # id in the dictionary, e.g. "ATP"
    year: int  # when the component was first dated


@dataclass(frozen=True)
class Score:
    """How well predicted SMILES match the references."""

    n: int  # number of predictions
    valid: float  # fraction that RDKit reads
    exact: float  # fraction with the reference's canonical SMILES
    tanimoto: float | None  # mean Morgan similarity (radius 2, 2048 bits) of the valid ones; None if none is valid


def component_molecules(cache_dir: Path | None = None) -> list[Molecule]:
    """All usable pairs, with unique names and SMILES, sorted by year and component.

    The first call reads the dictionary (about half a minute) and caches the pairs.

    Raises:
        ModuleNotFoundError: if biotite, which brings the dictionary, is not installed.
    """
    try:
        import biotite
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The molecules come with the Python package 'biotite', which is not installed. Install it with "
            "`pip install 'peft-caft[demo]'` under Python 3.11 or newer.",
            name="biotite",
        ) from error

    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    cache = cache_dir / f"molecules-v{CACHE_VERSION}-biotite{biotite.__version__}-rdkit{rdkit.__version__}.jsonl"
    if not cache.is_file():
        molecules = _without_duplicates(sorted(_read_dictionary(), key=lambda m: (m.year, m.component)))
        write_jsonl(cache, map(asdict, molecules))
    with cache.open(encoding="utf-8") as lines:
        return [Molecule(**json.loads(line)) for line in lines]


def split_of(molecule: Molecule) -> str:
    """``"train"`` (90 %), ``"dev"`` or ``"test"`` (5 % each).

    A hash of the SMILES *without* stereochemistry decides, so that stereoisomers are in one split.
    """
    flat = Chem.MolToSmiles(Chem.MolFromSmiles(molecule.smiles), isomericSmiles=False)
    percentile = int.from_bytes(hashlib.sha256(flat.encode()).digest()[:8], "big") % 100
    return "test" if percentile < 5 else "dev" if percentile < 10 else "train"


def messages(molecule: Molecule) -> dict[str, Any]:
    """``{"messages": [system, user, assistant]}``: the name, answered with the SMILES.

    A chat, as the heads of an instruct model were trained on, and the template ends the turn. The
    system message replaces SmolLM2's default one, which is longer and says nothing about the task.
    """
    return chat(SYSTEM_PROMPT, molecule.name, molecule.smiles)


def completion(molecule: Molecule) -> dict[str, str]:
    """``{"prompt", "completion"}`` for a base model that has no chat template."""
    return {"prompt": f"{SYSTEM_PROMPT}\n{molecule.name}\n", "completion": molecule.smiles}


def write_dataset(folder: Path, row: Callable[[Molecule], dict[str, Any]] = messages) -> dict[str, int]:
    """Write ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``; returns split -> number of rows.

    A hash of the component gives the rows a fixed random order, so the first N are a fair sample.
    """
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for molecule in sorted(component_molecules(), key=lambda m: hashlib.sha256(m.component.encode()).digest()):
        rows[split_of(molecule)].append(row(molecule))
    for split, own in rows.items():
        write_jsonl(Path(folder) / f"{split}.jsonl", own)
    return {split: len(own) for split, own in rows.items()}


def canonical_smiles(smiles: str) -> str | None:
    """RDKit's canonical form of a SMILES (outer white space is ignored); None if invalid."""
    smiles = smiles.strip()
    # RDKit reads "CCO is ethanol" as CCO with a title, and "" as a molecule without atoms.
    if not smiles or any(character.isspace() for character in smiles):
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule)


def score(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Compare predicted SMILES with the references, pair by pair.

    Raises:
        ValueError: if the lengths differ, there are no references, or one is invalid.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"predictions and references: got {len(predictions)} and {len(references)}, expected the same number, at "
            "least one. Pass one prediction for each reference."
        )
    fingerprints = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    exact, similarities = 0, []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        target = canonical_smiles(reference)
        if target is None:
            raise ValueError(f"references[{index}]: got {reference!r}, expected a valid SMILES. Fix or drop the row.")
        predicted = canonical_smiles(prediction)
        if predicted is None:
            continue
        exact += predicted == target
        bits = [fingerprints.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in (predicted, target)]
        similarities.append(DataStructs.TanimotoSimilarity(*bits))
    n = len(references)
    tanimoto = sum(similarities) / len(similarities) if similarities else None
    return Score(n=n, valid=len(similarities) / n, exact=exact / n, tanimoto=tanimoto)


def clean_name(name: str, component: str) -> str | None:
    """A component's name in one common style, or None if it is useless.

    Markup becomes plain text: ``~{N}`` and ``N~2~`` lose their tildes, ``$l^{4}`` becomes
    ``lambda4``. Old names, all in capitals, become lower case. Useless is what is too long, the
    component's own id, a code without any word, or broken over two lines, perhaps at a space.
    """
    name = name.strip().strip("\"'").replace('"', "''")
    name = re.sub(r"\$l\^\{(\d)\}", r"lambda\1", re.sub(r"~\{(\w+)\}", r"\1", name)).replace("~", "")
    if name == name.upper():
        name = CAPITALS.sub(lambda found: ",".join(d[:-1] + d[-1].upper() for d in found[0].split(",")), name.lower())
    has_word = re.search("[A-Za-z]{4}", name)
    usable = has_word and name.isascii() and name.isprintable() and len(name) <= MAX_NAME_LENGTH
    return name if usable and name.upper() != component.upper() else None


def _without_duplicates(molecules: Iterable[Molecule]) -> Iterator[Molecule]:
    """Keep the first of the molecules that share a SMILES or a name."""
    seen: set[str] = set()
    for molecule in molecules:
        keys = {molecule.smiles, molecule.name.lower()}
        if not keys & seen:
            yield molecule
        seen |= keys


def _read_dictionary() -> Iterator[Molecule]:
    from biotite.structure.info import get_ccd

    def columns(category: str, *names: str) -> list[np.ndarray]:
        return [dictionary[category][name].as_array() for name in names]

    def coordinates(pattern: str) -> np.ndarray:
        axes = [dictionary["chem_comp_atom"][pattern.format(axis)] for axis in "xyz"]
        return np.stack([axis.as_array(masked_value=np.nan) for axis in axes], axis=1)

    dictionary = get_ccd()
    components = columns("chem_comp", "id", "name", "pdbx_initial_date", "pdbx_release_status")
    owner_of_atom, *atoms = columns("chem_comp_atom", "comp_id", "atom_id", "type_symbol", "charge")
    owner_of_bond, *bonds = columns("chem_comp_bond", "comp_id", "atom_id_1", "atom_id_2", "value_order")
    # Nearly all components have ideal coordinates of every atom, most of the others measured ones.
    ideal, measured = coordinates("pdbx_model_Cartn_{}_ideal"), coordinates("model_Cartn_{}")
    atom_rows, bond_rows = _rows_of_each(owner_of_atom), _rows_of_each(owner_of_bond)
    nothing = slice(0, 0)
    for component, name, date, status in zip(*(column.tolist() for column in components), strict=True):
        year, name = int(date[:4]), clean_name(name, component)
        if year >= FIRST_UNUSED_YEAR or status != "REL" or name is None:
            continue
        rows = atom_rows.get(component, nothing)
        names, elements, charges = (column[rows].tolist() for column in atoms)
        own_bonds = zip(*(column[bond_rows.get(component, nothing)].tolist() for column in bonds), strict=True)
        positions = ideal[rows] if np.isfinite(ideal[rows]).all() else measured[rows]
        smiles = _smiles(names, elements, charges, own_bonds, positions)
        if smiles is not None:
            yield Molecule(name, smiles, component, year)


def _rows_of_each(owners: np.ndarray) -> dict[str, slice]:
    """Component -> its rows, which lie together in the dictionary."""
    starts = np.flatnonzero(np.append(True, owners[1:] != owners[:-1]))
    bounds = [*starts.tolist(), len(owners)]
    return {owners[start].item(): slice(start, stop) for start, stop in itertools.pairwise(bounds)}


def _smiles(
    names: list[str],
    elements: list[str],
    charges: list[int],
    bonds: Iterable[tuple[str, str, str]],
    coordinates: np.ndarray,
) -> str | None:
    """A component's canonical SMILES; None if it is too long, incomplete or not organic.

    Args:
        names, elements, charges: of each atom, hydrogens included; symbols are in capitals.
        bonds: (atom name, atom name, bond order) of each bond.
        coordinates: float ``(atoms, 3)`` in angstrom, NaN where unknown; for the stereochemistry.
    """
    heavy = [row for row, element in enumerate(elements) if element not in HYDROGENS]
    if not heavy or len(heavy) > MAX_SMILES_LENGTH or not all(elements[row] in ELEMENTS for row in heavy):
        return None
    if np.isnan(coordinates[heavy]).any():
        return None
    molecule, index = Chem.RWMol(), {}
    for row in heavy:
        atom = Chem.Atom(ELEMENTS[elements[row]])
        atom.SetFormalCharge(charges[row])
        index[names[row]] = molecule.AddAtom(atom)
    for first, second, order in bonds:
        if first in index and second in index:
            molecule.AddBond(index[first], index[second], BOND_TYPES[order])
    with rdBase.BlockLogs():
        if Chem.SanitizeMol(molecule, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
            return None
    # RDKit fills free valences with hydrogens: another number of them means missing atoms.
    if sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms()) != len(elements) - len(heavy):
        return None
    conformer = Chem.Conformer(len(heavy))
    conformer.SetPositions(coordinates[heavy])
    molecule.AddConformer(conformer)
    Chem.AssignStereochemistryFrom3D(molecule)
    smiles = Chem.MolToSmiles(molecule)
    # For a few cages, such as adamantanes, RDKit's canonical SMILES changes when read again.
    return smiles if len(smiles) <= MAX_SMILES_LENGTH and canonical_smiles(smiles) == smiles else None
