"""The data of the SmolLM2 heads (examples/smollm2_heads)."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import instruction_prompts
import pytest
import stdlib_functions
from instruction_prompts import GENERATORS, SHARES, make_prompts, normalised
from stdlib_functions import in_test, split_name
from topics import TOPICS

from peft_caft.basics.files import file_sha256
from peft_caft.training.data import read_jsonl

from ..support.places import EXAMPLES

EXAMPLE = EXAMPLES / "smollm2_heads"
SOURCE = '''
import abc

def documented(a, b=1):
    """Return the sum."""
    return a + b

def undocumented(a):
    return a

class Shape:
    """A class is not a function."""

    @property
    def area(self):
        """How large it is."""
        def inner():
            """Part of area, not a row of its own."""
        return inner() + 0

if abc:
    def renamed(a, b=1):
        """The sum again, under another name."""
        return a  +  b
'''
WITHOUT_REASONING_GYM = {"write": 0.5, "discuss": 0.2, "general": 0.3}


@pytest.fixture(scope="module")
def functions():
    return stdlib_functions.stdlib_functions(max_files=150)


@pytest.fixture(scope="module")
def prompts(functions):
    return make_prompts(functions, {"train": 400, "test": 50}, seed=0, shares=WITHOUT_REASONING_GYM)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All files, in a small edition: the folder and its record."""
    pytest.importorskip("reasoning_gym")
    from build_data import build

    folder = tmp_path_factory.mktemp("heads_data")
    return folder, build(folder, train_prompts=400, test_prompts=60, max_files=150)


def test_functions_with_a_docstring_are_found_once(tmp_path):
    (tmp_path / "shapes.py").write_text(SOURCE)
    found = stdlib_functions.stdlib_functions(tmp_path)
    assert [(function.module, function.name) for function in found] == [
        ("shapes", "documented"),
        ("shapes", "Shape.area"),
    ]
    assert found[0].source == 'def documented(a, b=1):\n    """Return the sum."""\n    return a + b'
    assert found[0].arguments == "a, b=1"
    assert found[1].source.startswith("@property\ndef area(self):")
    assert "Part of area" in found[1].source


def test_tests_long_functions_and_unreadable_files_are_left_out(tmp_path):
    function = 'def one():\n    """Doc."""\n    return 1\n'
    for folder in ("test", "pkg/tests", "site-packages", "lib2to3", "idlelib"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text(function)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "long.py").write_text('def long():\n    """Doc."""\n' + "    value = 1\n" * 100)
    latin = 'def name():\n    """Doc é."""\n'
    (tmp_path / "latin.py").write_bytes(latin.encode("latin-1"))
    assert stdlib_functions.stdlib_functions(tmp_path) == []
    (tmp_path / "pkg" / "__init__.py").write_text(function)
    assert [found.module for found in stdlib_functions.stdlib_functions(tmp_path)] == ["pkg"]


def test_functions_of_packages_hold_none_of_the_standard_library(functions, tmp_path, monkeypatch):
    (tmp_path / "pretend").mkdir()
    (tmp_path / "pretend" / "__init__.py").write_text(SOURCE)
    copies = "\n\n\n".join(function.source for function in functions if function.test)
    (tmp_path / "pretend" / "copied.py").write_text(copies)
    (tmp_path / "another.py").write_text("")  # a module that is one file has no folder of its own
    monkeypatch.syspath_prepend(str(tmp_path))
    found = stdlib_functions.package_functions(["pretend"], functions)
    assert [(function.module, function.name) for function in found] == [
        ("pretend.__init__", "documented"),
        ("pretend.__init__", "Shape.area"),
    ]
    assert stdlib_functions.package_functions(["pretend"], [*functions, *found]) == []
    for name in ("no_such_package", "another"):
        with pytest.raises(ModuleNotFoundError, match=f"got '{name}', expected the folder of an installed one"):
            stdlib_functions.package_functions([name], functions)


def test_functions_keep_their_limits_and_parse(functions):
    assert len(functions) > 300
    for function in functions:
        assert len(function.source) <= stdlib_functions.MAX_CHARACTERS
        (definition,) = ast.parse(function.source).body
        assert ast.get_docstring(definition)


def test_no_module_and_no_function_is_in_both_splits(functions):
    for key in (lambda f: split_name(f.module), lambda f: f.body, lambda f: f.source):
        train = {key(function) for function in functions if not function.test}
        test = {key(function) for function in functions if function.test}
        assert train
        assert test
        assert not train & test


def test_a_module_keeps_its_split_in_other_python_versions():
    # Python 3.12 moved the code of datetime into _pydatetime; the code of decimal has been in _pydecimal since 3.5.
    assert split_name("_pydatetime") == split_name("datetime") == "datetime"
    assert split_name("_collections_abc") == "collections_abc"
    assert split_name("email.mime.text") == "email"
    held_out = [name for name in sys.stdlib_module_names if in_test(stdlib_functions.MODULE_SPLIT, split_name(name))]
    assert {"ast", "random", "statistics"} <= set(held_out)
    assert 0.04 < len(held_out) / len(sys.stdlib_module_names) < 0.14


def test_prompts_have_their_sizes_kinds_and_limit(prompts):
    assert [len(prompts["train"]), len(prompts["test"])] == [400, 50]
    for row in prompts["train"] + prompts["test"]:
        assert row.keys() == {"prompt", "source"}
        assert 0 < len(row["prompt"]) <= instruction_prompts.MAX_CHARACTERS
        if row["source"].split(":")[0] in {*TOPICS, "module"}:
            assert "{" not in row["prompt"]  # every field of the template is filled
    kinds = [row["source"].split(":")[0] for row in prompts["train"]]
    assert kinds.count("write") == 200
    assert kinds.count("discuss") == 80


def test_no_prompt_and_no_source_is_in_both_splits(prompts):
    train, test = ({normalised(row["prompt"]) for row in prompts[split]} for split in ("train", "test"))
    assert len(train) == 400  # and none twice
    assert len(test) == 50
    assert not train & test
    train, test = (
        {part for row in prompts[split] for part in row["source"].split(":")[1].split("/")}
        for split in ("train", "test")
    )
    assert not train & test


def test_another_seed_makes_another_choice_from_the_same_sources(functions, prompts):
    other = make_prompts(functions, {"train": 400, "test": 50}, seed=1, shares=WITHOUT_REASONING_GYM)
    assert other != prompts
    held_out = {split_name(f.module) for f in functions if f.test}
    for row in other["train"]:
        kind, _, name = row["source"].partition(":")
        if kind in ("write", "discuss"):
            assert split_name(name) not in held_out


@pytest.mark.parametrize("word_count", [30, 300])
def test_long_tasks_are_cut_at_a_sentence(word_count):
    text = " ".join(f"This is sentence {number}." for number in range(word_count))
    cut = instruction_prompts._whole_sentences(text, 600)
    assert len(cut) <= 600
    assert text.startswith(cut)
    assert cut.endswith(".")
    assert instruction_prompts._whole_sentences("word " * 400, 600).endswith("word")


def test_files_are_what_the_record_says(built):
    folder, record = built
    assert json.loads((folder / "data.provenance.json").read_text()) == record
    assert record["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    for name, file in record["files"].items():
        assert file_sha256(folder / name) == file["sha256"]
        assert len((folder / name).read_text(encoding="utf-8").splitlines()) == file["rows"] > 0
    assert record["files"]["prompts_train.jsonl"]["rows"] == 400
    assert record["files"]["prompts_test.jsonl"]["rows"] == 60


def test_functions_are_rows_that_training_reads(built):
    for split in ("train", "test"):
        rows = read_jsonl(built[0] / f"functions_{split}.jsonl")
        assert all(row["text"] and row["name"] and row["module"] for row in rows)


def test_every_kind_of_prompt_is_in_and_none_in_both_splits(built):
    rows = {
        split: [json.loads(line) for line in (built[0] / f"prompts_{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    }
    kinds = [row["source"].split(":")[0] for row in rows["train"]]
    assert kinds.count("codeio") == round(SHARES["coding"] * 400)
    assert sum(kinds.count(name) for name in GENERATORS) == round(SHARES["reasoning"] * 400)
    assert set(GENERATORS) <= set(kinds)
    for key in ("prompt", "source"):
        train, test = ({normalised(row[key]) for row in rows[split]} for split in ("train", "test"))
        assert not train & test


def test_prompts_do_not_depend_on_the_hash_seed_of_the_process():
    pytest.importorskip("reasoning_gym")
    # Three generators of reasoning-gym did, and are left out for it.
    code = """
        from instruction_prompts import make_prompts
        from stdlib_functions import stdlib_functions
        print(make_prompts(stdlib_functions(max_files=20), {"train": 300, "test": 60}, seed=0))
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=EXAMPLE,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(outputs[0]) > 10_000
    assert hashlib.sha256(outputs[0]).digest() == hashlib.sha256(outputs[1]).digest()
