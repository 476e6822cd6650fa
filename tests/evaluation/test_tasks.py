"""Tasks as files, and the builder."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from peft_caft.basics.files import file_sha256
from peft_caft.evaluation.task import Metric, Splits, Task, chat, load_task, share_of_cut_words
from peft_caft.evaluation.task_building import build_main, build_task, require_disjoint
from peft_caft.training.data import read_jsonl

from ..support import toy_task
from ..support.tiny_checkpoint import tiny_tokenizer

TOY = Path(toy_task.__file__)


def rows_of(folder: Path, split: str) -> list[dict]:
    return read_jsonl(folder / f"{split}.jsonl")


def test_build_writes_the_sizes_asked_for_and_says_what_they_are(tmp_path):
    record = build_task(load_task(TOY), tmp_path, {"test": 5, "dev": 0})
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl", "data.json"}
    assert json.loads((tmp_path / "data.json").read_text()) == record
    for split, size in (("train", 12), ("test", 5)):
        assert len(rows_of(tmp_path, split)) == record["files"][f"{split}.jsonl"]["rows"] == size
        assert record["files"][f"{split}.jsonl"]["sha256"] == file_sha256(tmp_path / f"{split}.jsonl")
    assert record["disjoint"] == {"prompt": {"train": 12, "test": 5}}
    assert rows_of(tmp_path, "test")[0]["number"] == 200


def test_same_sizes_give_the_same_bytes_and_fewer_the_first_rows(tmp_path):
    task = load_task(TOY)
    for folder, sizes in (("a", {}), ("b", {}), ("c", {"train": 3})):
        build_task(task, tmp_path / folder, sizes)
    for split in task.sizes:
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
    assert rows_of(tmp_path / "c", "train") == rows_of(tmp_path / "a", "train")[:3]
    # On any machine and in any version: results on other bytes do not compare.
    assert file_sha256(tmp_path / "a" / "dev.jsonl").startswith("ad501e8073afc75e5d3ca69f98475e76")


def test_build_that_fails_leaves_no_record_of_being_whole(tmp_path, monkeypatch):
    task = load_task(TOY)
    build_task(task, tmp_path)
    before = (tmp_path / "test.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"test: got 30 rows .* expected 31"):
        build_task(task, tmp_path, {"test": 31})
    assert (tmp_path / "data.json").exists()
    assert (tmp_path / "test.jsonl").read_bytes() == before  # nothing was touched
    monkeypatch.setattr(
        "peft_caft.evaluation.task_building.write_text", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        build_task(task, tmp_path)
    assert not (tmp_path / "data.json").exists()


class Leaky(Task):
    name = "leaky"
    metrics = ()
    sizes = {"train": 2, "test": 1}  # noqa: RUF012

    def __init__(self, train, test):
        self.rows = {"train": train, "test": test}

    def build(self, sizes, cache):
        return Splits(self.rows, {})

    def keys(self, row):
        return {"first letter": row["messages"][-1]["content"][0]}

    def score(self, rows, answers):
        return {}


def test_leak_is_found_and_refused_before_anything_is_written(tmp_path):
    train = [chat("", "1", "apple"), chat("", "2", "banana")]
    with pytest.raises(ValueError, match=r"first letter: 'b' is in train and in test"):
        build_task(Leaky(train, [chat("", "3", "bread")]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert require_disjoint(Leaky([], []), {"train": train, "test": [chat("", "3", "corn")]}) == {
        "first letter": {"train": 2, "test": 1}
    }


def test_row_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train: the row with the prompt '1' is there twice"):
        build_task(Leaky([chat("", "1", "apple")] * 2, [chat("", "3", "corn")]), tmp_path)


def test_task_file_builds_from_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["toy_task.py", "--output", str(tmp_path / "data"), *options])
        runpy.run_path(str(TOY), run_name="__main__")

    run("--train", "3", "--dev", "0")
    printed = capsys.readouterr().out
    assert "| train.jsonl | 3 " in printed
    assert "No prompt is in two splits: 3 in train, 6 in test" in printed
    record = json.loads((tmp_path / "data" / "data.json").read_text())
    assert record["command"] == "toy_task.py --output data --train 3 --dev 0"  # no path of this machine
    with pytest.raises(SystemExit) as ended:
        run("--train", "99")
    assert ended.value.code == 1
    assert "Error: train: got 12 rows" in capsys.readouterr().err


def test_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, capsys):
    task = load_task(TOY)
    missing = ModuleNotFoundError("No module named 'moses'", name="molsets")
    monkeypatch.setattr(type(task), "build", lambda *_: (_ for _ in ()).throw(missing))
    monkeypatch.setattr(sys, "argv", ["task.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        build_main(task)
    assert "'molsets' is not installed. Run `pip install 'peft-caft[tasks]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("x = 1", TypeError, "TASK of .* is None"),
        ("TASK = 3", TypeError, "TASK of .* is 3"),
        ("import no_such_package_at_all", ModuleNotFoundError, "needs 'no_such_package_at_all'"),
    ],
)
def test_file_that_is_no_task_is_refused(content, error, message, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(content)
    with pytest.raises(error, match=message):
        load_task(path)
    assert str(tmp_path) not in sys.path


def test_two_tasks_of_one_file_name_and_their_neighbours_do_not_mix(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"neighbour_{name}.py").write_text(f"NAME = {name!r}")
        (tmp_path / name / "task.py").write_text(
            f"from neighbour_{name} import NAME\nfrom peft_caft.evaluation.task import Task\n"
            "class T(Task):\n    name, metrics, sizes = NAME, (), {}\n"
            "    def build(self, sizes, cache): pass\n    def score(self, rows, answers): return {}\nTASK = T()\n"
        )
    tasks = [load_task(tmp_path / name / "task.py") for name in ("one", "two")]
    assert [task.name for task in tasks] == ["one", "two"]


def test_words_are_grouped_by_the_share_that_is_cut():
    tokenizer = tiny_tokenizer(["ethanol benzene"] * 50)
    whole, cut = "ethanol", "quixotry"
    assert len(tokenizer(whole)["input_ids"]) == 1 < len(tokenizer(cut)["input_ids"])
    cases = {
        "0 %": f"2-{whole}, {whole}",
        "up to 50 %": f"{whole} 1,2-{cut}",
        "up to 75 %": f"{whole} {cut} {cut}",
        "up to 99 %": f"{whole} {cut}-{cut} {cut} {cut}",
        "100 %": f"N-{cut}",
        "no words": "1,2-N-ol",
    }
    assert {share_of_cut_words(text, tokenizer) for text in cases.values()} == set(cases)
    assert all(share_of_cut_words(text, tokenizer) == group for group, text in cases.items())


def test_metric_says_which_way_is_better():
    assert Metric("exact", "").higher_is_better
    assert not load_task(TOY).metrics[1].higher_is_better
