"""The molecule task: names and SMILES that belong together, splits that share nothing, metrics that count right."""

import json
import re

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from peft_caft.demo import molecules
from peft_caft.demo.molecules import (
    Molecule,
    Score,
    canonical_smiles,
    clean_name,
    completion,
    component_molecules,
    score,
    split_of,
    write_dataset,
)
from peft_caft.training.data import read_jsonl

INVALID = ["", "  ", "C1CC", "C(C)(C)(C)(C)C", "ethanol", "CCO is ethanol", "CCO\nCCO", "c1cccc1"]


@pytest.mark.parametrize("smiles", INVALID)
def test_invalid_smiles_are_no_molecules(smiles, capfd):
    assert canonical_smiles(smiles) is None
    assert capfd.readouterr() == ("", "")  # RDKit prints an explanation of each, thousands in an evaluation


@pytest.mark.parametrize("smiles", ["CCO", " CCO\n", "C[C@H](N)C(=O)O", "[Na+].[Cl-]", "c1ccccc1"])
def test_valid_smiles_are_molecules(smiles):
    assert canonical_smiles(smiles) is not None


def test_exact_match_ignores_spelling_but_not_stereochemistry():
    assert score(["OCC", "C1=CC=CC=C1"], ["CCO", "c1ccccc1"]).exact == 1
    assert score(["CCC", "C[C@H](N)C(=O)O", "nonsense"], ["CCO", "C[C@@H](N)C(=O)O", "CCO"]).exact == 0


def test_score_counts_pairs():
    def bits(smiles):
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
        return set(generator.GetFingerprint(Chem.MolFromSmiles(smiles)).GetOnBits())

    propanol, ethanol = bits("CCCO"), bits("CCO")
    similarity = len(propanol & ethanol) / len(propanol | ethanol)
    assert 0 < similarity < 1
    result = score(["OCC", "CCCO", "C1CC", "CCO "], ["CCO"] * 4)
    assert result == Score(n=4, valid=0.75, exact=0.5, tanimoto=pytest.approx((1 + similarity + 1) / 3))


def test_score_without_a_valid_prediction_has_no_similarity():
    assert score(["nonsense"], ["CCO"]) == Score(n=1, valid=0.0, exact=0.0, tanimoto=None)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "got 0 and 0"),
        (["CCO"], ["CCO", "C"], "got 1 and 2"),
        (["CCO"], ["C1CC"], r"references\[0\]: got 'C1CC'"),
    ],
)
def test_score_refuses_what_it_cannot_count(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2-azanyl-~{N}-[(2~{R})-butan-2-yl]benzamide", "2-azanyl-N-[(2R)-butan-2-yl]benzamide"),
        ("N~2~-(phenylsulfonyl)-L-glutamine", "N2-(phenylsulfonyl)-L-glutamine"),
        ("methyl-$l^{4}-sulfanyl", "methyl-lambda4-sulfanyl"),
        ("ALPHA-D-GLUCOPYRANOSE", "alpha-D-glucopyranose"),
        ("N,2-DIMETHYL-2H-PYRAZOLO[3,4-D]PYRIMIDINE", "N,2-dimethyl-2H-pyrazolo[3,4-d]pyrimidine"),
        ("(2R,3AS)-5'-O-PHOSPHONO-(E)-ADENOSINE", "(2R,3aS)-5'-O-phosphono-(E)-adenosine"),
        ("(2S)-2-methyl-1H-Indole", "(2S)-2-methyl-1H-Indole"),  # not all in capitals: left as it is
        ("  'caffeine' ", "caffeine"),
        ('adenylyl-2"-tobramycin', "adenylyl-2''-tobramycin"),
        ("XYZAB", None),  # only the id
        ("FKB-001", None),  # a code
        ("propan-\n2-ol", None),
        ("β-alanine", None),
        ("methyl" * 26, None),
    ],
)
def test_names_have_one_style_and_useless_ones_are_dropped(name, expected):
    assert clean_name(name, "XYZAB") == expected


ALANINE = {
    "names": ["N", "CA", "C", "O", "CB", "OXT", "H", "H2", "HA", "HB1", "HB2", "HB3", "HXT"],
    "elements": ["N", "C", "C", "O", "C", "O", "H", "H", "H", "H", "H", "H", "H"],
    "charges": [0] * 13,
    "bonds": [
        *(("N", "CA", "SING"), ("CA", "C", "SING"), ("C", "O", "DOUB"), ("CA", "CB", "SING"), ("C", "OXT", "SING")),
        *(("N", "H", "SING"), ("N", "H2", "SING"), ("CA", "HA", "SING"), ("OXT", "HXT", "SING")),
        *(("CB", "HB1", "SING"), ("CB", "HB2", "SING"), ("CB", "HB3", "SING")),
    ],
}


@pytest.fixture
def alanine():
    """L-alanine as the dictionary has it; the coordinates (angstrom) of its hydrogens do not matter."""
    coordinates = np.zeros((13, 3))
    coordinates[:6] = [
        *((-0.966, 0.493, 1.500), (0.257, 0.418, 0.692), (-0.094, 0.017, -0.716)),
        *((-1.056, -0.682, -0.923), (1.204, -0.620, 1.296), (0.661, 0.439, -1.742)),
    ]
    return ALANINE | {"coordinates": coordinates}


def test_stereochemistry_comes_from_the_coordinates(alanine):
    assert molecules._smiles(**alanine) == "C[C@H](N)C(=O)O"
    alanine["coordinates"] *= -1
    assert molecules._smiles(**alanine) == "C[C@@H](N)C(=O)O"


def test_charges_and_hydrogens_are_kept(alanine):
    proton = {name: [*alanine[name][:-1]] for name in ("names", "elements", "charges")}
    proton["charges"][5] = -1
    assert molecules._smiles(**alanine | proton | {"coordinates": alanine["coordinates"][:-1]}) == "C[C@H](N)C(=O)[O-]"


@pytest.mark.parametrize(
    "damage", ["metal", "missing hydrogen", "no coordinates", "five bonds", "nothing", "too long"]
)
def test_incomplete_or_inorganic_components_are_dropped(alanine, monkeypatch, damage):
    if damage == "metal":
        alanine["elements"] = ["FE", *alanine["elements"][1:]]
    elif damage == "missing hydrogen":
        alanine["elements"], alanine["names"] = alanine["elements"][:-1], alanine["names"][:-1]
    elif damage == "no coordinates":
        alanine["coordinates"][0] = float("nan")
    elif damage == "five bonds":
        alanine["bonds"] = [*alanine["bonds"], ("CA", "O", "TRIP")]
    elif damage == "nothing":
        alanine = {"names": [], "elements": [], "charges": [], "bonds": [], "coordinates": alanine["coordinates"][:0]}
    else:
        monkeypatch.setattr(molecules, "MAX_SMILES_LENGTH", 14)
    assert molecules._smiles(**alanine) is None


MOLECULES = [
    Molecule(
        f"alkane {carbons} {oxygens}", canonical_smiles("C" * carbons + "CO" * oxygens), f"{carbons}-{oxygens}", 2000
    )
    for carbons in range(1, 20)
    for oxygens in range(1, 20)
]


def test_pairs_are_cached_without_duplicates(tmp_path, monkeypatch):
    pytest.importorskip("biotite")
    first, later = Molecule("ethanol", "CCO", "EOH", 1999), Molecule("propane", "CCC", "TME", 2003)
    same_name, same_smiles = Molecule("Ethanol", "CCN", "XXX", 2001), Molecule("alcohol", "CCO", "YYY", 2010)
    monkeypatch.setattr(molecules, "_read_dictionary", lambda: [same_smiles, later, same_name, first])
    assert component_molecules(tmp_path) == [first, later]
    monkeypatch.setattr(molecules, "_read_dictionary", lambda: pytest.fail("read the dictionary again"))
    assert component_molecules(tmp_path) == [first, later]


def test_failure_while_reading_leaves_no_cache(tmp_path, monkeypatch):
    pytest.importorskip("biotite")

    def read_half():
        yield Molecule("ethanol", "CCO", "EOH", 1999)
        raise OSError("unreadable")

    monkeypatch.setattr(molecules, "_read_dictionary", read_half)
    with pytest.raises(OSError, match="unreadable"):
        component_molecules(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stereoisomers_are_in_the_same_split():
    splits = set()
    for carbons in range(1, 60):
        chain = "C" * carbons
        pair = [Molecule("x", f"{chain}[C@{hand}H](N)C(=O)O", "X", 2000) for hand in ("", "@")]
        assert split_of(pair[0]) == split_of(pair[1])
        splits.add(split_of(pair[0]))
    assert splits == {"train", "dev", "test"}


def test_dataset_files_are_chats_whose_answer_is_the_smiles(tmp_path, monkeypatch):
    monkeypatch.setattr(molecules, "component_molecules", lambda: MOLECULES)
    sizes = write_dataset(tmp_path / "data")
    smiles_of = {molecule.name: molecule.smiles for molecule in MOLECULES}
    seen = []
    for split, size in sizes.items():
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == size > 0
        for row in rows:
            assert list(row) == ["messages"]
            system, user, assistant = row["messages"]
            assert [message["role"] for message in (system, user, assistant)] == ["system", "user", "assistant"]
            assert assistant["content"] == smiles_of[user["content"]]
            seen.append(user["content"])
    assert sorted(seen) == sorted(smiles_of)  # each in exactly one file
    assert sizes["train"] > 0.8 * len(MOLECULES)


def test_rows_for_a_model_without_chat_template_end_in_the_smiles_too(tmp_path, monkeypatch):
    monkeypatch.setattr(molecules, "component_molecules", lambda: MOLECULES)
    sizes = write_dataset(tmp_path, row=completion)
    rows = [row for split in sizes for row in read_jsonl(tmp_path / f"{split}.jsonl")]
    assert {row["completion"] for row in rows} == {m.smiles for m in MOLECULES}
    assert all(m.name in next(r["prompt"] for r in rows if r["completion"] == m.smiles) for m in MOLECULES)


def test_dataset_does_not_depend_on_the_order_of_the_pairs(tmp_path, monkeypatch):
    for folder, pairs in (("a", MOLECULES), ("b", MOLECULES[::-1])):
        monkeypatch.setattr(molecules, "component_molecules", lambda pairs=pairs: pairs)
        write_dataset(tmp_path / folder)
    for split in ("train", "dev", "test"):
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "b" / f"{split}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def dictionary():
    pytest.importorskip("biotite")
    from biotite.structure.info import get_ccd

    return get_ccd()


@pytest.fixture(scope="module")
def pairs(dictionary):
    """All pairs, from the cache of this machine if it has them, else made in half a minute."""
    return component_molecules()


@pytest.mark.slow
def test_pairs_are_unique_short_and_from_before_2024(pairs, dictionary):
    assert len(pairs) > 36_000
    assert len({m.smiles for m in pairs}) == len({m.name.lower() for m in pairs}) == len(pairs)
    assert max(len(m.smiles) for m in pairs) <= 80
    assert max(len(m.name) for m in pairs) <= 150
    columns = (dictionary["chem_comp"][name].as_array().tolist() for name in ("id", "pdbx_initial_date"))
    dates = dict(zip(*columns, strict=True))
    assert all(dates[m.component][:4] == str(m.year) < "2024" for m in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "name", "smiles"),
    [
        ("CFF", "caffeine", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"),
        ("ALA", "alanine", "OC(=O)[C@@H](N)C"),
        ("GLC", "alpha-D-glucopyranose", "OC[C@H]1O[C@H](O)[C@H](O)[C@@H](O)[C@@H]1O"),
        ("FUM", "fumaric acid", r"OC(=O)/C=C/C(=O)O"),
    ],
)
def test_well_known_molecules_are_right(pairs, component, name, smiles):
    (molecule,) = [molecule for molecule in pairs if molecule.component == component]
    assert molecule.name == name
    assert molecule.smiles == canonical_smiles(smiles)


@pytest.mark.slow
def test_formulas_are_those_of_the_dictionary(pairs, dictionary):
    columns = (dictionary["chem_comp"][name].as_array().tolist() for name in ("id", "formula"))
    formulas = dict(zip(*columns, strict=True))

    def elements(formula):
        return {element: number or "1" for element, number in re.findall(r"([A-Z][a-z]?)(\d*)", formula)}

    sample = pairs[::20]
    equal = [elements(formulas[m.component]) == elements(CalcMolFormula(Chem.MolFromSmiles(m.smiles))) for m in sample]
    assert sum(equal) >= 0.998 * len(sample)  # a few formulas in the dictionary are wrong


@pytest.mark.slow
def test_chirality_is_that_of_the_names(pairs):
    """Names that begin with their only descriptor, such as "(2R)-...", state it independently of the coordinates."""
    named = {m: re.findall(r"\(\d*([RS])\)-", m.name) for m in pairs[::5]}
    stated = {
        m: found[0] for m, found in named.items() if len(found) == 1 and not re.search(r"[RSEZ],|[dDlL]-", m.name)
    }
    centres = {
        m: Chem.FindMolChiralCenters(Chem.MolFromSmiles(m.smiles), useLegacyImplementation=False) for m in stated
    }
    single = {m: found[0][1] for m, found in centres.items() if len(found) == 1}
    assert len(single) > 300
    assert sum(stated[m] == label for m, label in single.items()) >= 0.95 * len(single)


@pytest.mark.slow
def test_splits_share_no_molecule_not_even_a_stereoisomer(pairs):
    flat = {split: set() for split in ("train", "dev", "test")}
    for molecule in pairs:
        flat[split_of(molecule)].add(molecule.smiles.replace("@", "").replace("/", "").replace("\\", ""))
    assert not flat["train"] & flat["test"]
    assert not flat["train"] & flat["dev"]
    assert not flat["dev"] & flat["test"]
    shares = [len(molecules) / sum(map(len, flat.values())) for molecules in flat.values()]
    assert shares == pytest.approx([0.90, 0.05, 0.05], abs=0.01)
