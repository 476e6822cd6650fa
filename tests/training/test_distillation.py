"""`peft-caft distill`: whose words it writes, and that no interruption loses, repeats or changes a row."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peft_caft.basics.parts import Parts
from peft_caft.training.data import encode, read_jsonl
from peft_caft.training.distillation import distill
from peft_caft.training.distilled_answers import AnswerReader, rejection
from peft_caft.training.generation import stop_token_ids
from peft_caft.training.prompts import prepare_prompts, read_prompts
from peft_caft.training.settings import DistillationSettings

from ..support.forked_command import finish, kill_when
from ..support.places import EXAMPLES, ROOT
from ..support.processes import fsdp1_config
from ..support.tiny_checkpoint import WORDS, save_checkpoint, tiny_llama, tiny_tokenizer

STOP = 1  # </s>
NEW_TOKENS = 12  # at most, of an answer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A checkpoint, prompts of many lengths, and the answers of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("files")
    prompts = write(
        folder / "prompts.jsonl", *({"prompt": f"name {WORDS[i % 12]} {i}, " * (1 + i % 3)} for i in range(60))
    )
    files = {"model": save_checkpoint(folder / "model"), "prompts": prompts, "answers": str(folder / "answers.jsonl")}
    distill(settings(files, files["answers"]))
    return files


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(files: dict[str, str], output: str | Path, **changes) -> DistillationSettings:
    small = DistillationSettings(
        files["model"], files["prompts"], str(output), max_new_tokens=NEW_TOKENS, batch_size=4
    )
    return replace(small, **changes)


def counts(output: str | Path) -> dict[str, int]:
    return json.loads(Path(output).with_suffix(".provenance.json").read_text())["counts"]


# What is written


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
def test_rows_are_the_models_own_answers_in_the_order_of_the_prompts(files, tmp_path, template):
    model = shutil.copytree(files["model"], tmp_path / "model")
    if not template:
        (model / "chat_template.jinja").unlink()
    output = tmp_path / "answers.jsonl"
    distill(settings(files, output, model=str(model), temperature=0.0, max_repetition=1.0, max_prompts=12))
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows = read_jsonl(output)
    assert [row["prompt_index"] for row in rows] == list(range(12))
    for row, prompt in zip(rows, read_jsonl_prompts(files)[:12], strict=True):
        if template:
            assert row["messages"][:-1] == [{"role": "user", "content": prompt}]
            answer = row["messages"][-1]["content"]
            text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        else:
            assert row["prompt"] == prompt
            answer, text = row["completion"], prompt
        input_ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = loaded.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )[0, input_ids.shape[1] :]
        assert row["complete"] == (STOP in alone.tolist())
        expected = tokenizer.decode(alone, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer == (expected if row["complete"] else expected.rstrip("\ufffd"))
    assert encode(rows, tokenizer, max_length=512, quiet=True).dropped == 0


def read_jsonl_prompts(files: dict[str, str]) -> list[str]:
    return [json.loads(line)["prompt"] for line in Path(files["prompts"]).read_text().splitlines()]


def test_the_models_own_generation_config_does_not_bend_its_distribution(files, tmp_path):
    model = shutil.copytree(files["model"], tmp_path / "model")
    bent = {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(bent))
    distill(settings(files, tmp_path / "answers.jsonl", model=str(model)))
    assert (tmp_path / "answers.jsonl").read_bytes() == Path(files["answers"]).read_bytes()


def test_another_seed_gives_other_answers(files, tmp_path):
    for seed in (0, 1):
        distill(settings(files, tmp_path / f"{seed}.jsonl", seed=seed, max_prompts=4))
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "1.jsonl").read_bytes()


def test_counts_add_up_and_provenance_says_how_it_was_made(files):
    record = json.loads(Path(files["answers"]).with_suffix(".provenance.json").read_text())
    count = record["counts"]
    rows = read_jsonl(files["answers"])
    assert count["kept"] == len(rows) == count["complete"] + count["cut_off"]
    assert count["complete"] == sum(row["complete"] for row in rows) > 0
    assert (
        count["answers"] == 60 == count["kept"] + sum(n for name, n in count.items() if name.startswith("rejected_"))
    )
    assert record["settings"]["model"] == "model"
    assert record["settings"]["prompts"] == "prompts.jsonl"
    assert len(record["settings"]["weights_sha256"]) == len(record["settings"]["tokenized_prompts_sha256"]) == 64
    assert {"prompts_sha256", "seed", "temperature", "max_new_tokens", "stop_token_ids"} <= set(record["settings"])
    assert 60 <= record["tokens"] <= 60 * NEW_TOKENS
    assert record["process_seconds"] > 0
    assert record["versions"]["transformers"]
    assert str(ROOT) not in json.dumps(record)


# Reading answers


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def read_answer(tokenizer, ids: list[int], stops: tuple[int, ...] = (STOP,)) -> dict:
    prompts, _ = prepare_prompts([("here", {"prompt": "name"})], tokenizer)
    return AnswerReader(tokenizer, list(stops), 0.5).read(prompts[0], 0, ids)


def test_an_answer_is_complete_if_the_model_ended_it(tokenizer):
    ids = tokenizer("ethanol propane")["input_ids"]
    ended, cut = read_answer(tokenizer, [*ids, STOP]), read_answer(tokenizer, ids)
    assert ended["answer"] == cut["answer"] == "ethanol propane"
    assert ended["complete"]
    assert not cut["complete"]
    assert ended["same_tokens"]
    assert cut["same_tokens"]


def test_an_answer_ends_before_a_special_token_and_is_then_not_complete(tokenizer):
    ids = tokenizer("ethanol")["input_ids"]
    result = read_answer(tokenizer, [*ids, tokenizer.bos_token_id, *ids, STOP])
    assert (result["answer"], result["complete"]) == ("ethanol", False)


def test_a_character_cut_in_half_is_left_out(tokenizer):
    ids = tokenizer("ethanol é")["input_ids"]
    result = read_answer(tokenizer, ids[:-1])
    assert result["answer"] == "ethanol "
    assert result["same_tokens"]


def test_text_that_is_tokenized_otherwise_than_it_was_written_is_counted(tokenizer, files):
    letters = [token for letter in "ethanol" for token in tokenizer(letter)["input_ids"]]
    result = read_answer(tokenizer, [*letters, STOP])
    assert result["answer"] == "ethanol"
    assert not result["same_tokens"]
    assert counts(files["answers"])["retokenized_differently"] > 0  # a random model hardly writes canonical tokens


def test_answers_end_at_every_eos_of_the_model_and_at_the_end_of_turn(tokenizer, files):
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[5, 7])) == [1, 5, 7]
    assert stop_token_ids(tokenizer, None) == [1]
    chat = tiny_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chat.chat_template = chat.chat_template.replace("</s>", "<end>")
    assert stop_token_ids(chat, None) == [1, chat.convert_tokens_to_ids("<end>")]
    chat.chat_template, chat.eos_token = None, None
    with pytest.raises(ValueError, match="eos_token: got None"):
        stop_token_ids(chat, None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" \n\t", "empty"),
        ("I do not know. " * 12, "repetitive"),
        ("Yes.\n" * 30, "repetitive"),
        ("." * 60, "repetitive"),
        ("The answer is 7, because a week has seven days. " + "Step: add one to it.\n" * 20, "repetitive"),
        ("ethanol", None),
        ("no no no", None),
        ("".join(f"{n} times 7 is {7 * n}\n" for n in range(1, 11)), None),
        (
            "def area(r):\n    return 3 * r * r\n\n\ndef length(r):\n    return 6 * r\n\n\nprint(area(2), length(2))\n",
            None,
        ),
    ],
)
def test_empty_and_degenerate_answers_are_left_out(tokenizer, answer, reason):
    assert rejection(answer, tokenizer(answer)["input_ids"]) == reason


# Prompts


def test_equal_prompts_are_answered_once_and_equal_answers_written_once(files, tmp_path):
    prompts = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "source": "other"})
    output = tmp_path / "answers.jsonl"
    distill(settings(files, output, prompts=prompts, samples_per_prompt=3, top_k=1, max_repetition=1.0))
    assert [row["prompt_index"] for row in read_jsonl(output)] == [0, 1]
    count = counts(output)
    assert (count["prompts"], count["duplicate_prompts"], count["answers"], count["rejected_duplicate"]) == (
        3,
        1,
        6,
        4,
    )


def test_several_answers_to_a_prompt_differ(files, tmp_path):
    distill(settings(files, tmp_path / "a.jsonl", max_prompts=3, samples_per_prompt=4))
    assert [row["prompt_index"] for row in read_jsonl(tmp_path / "a.jsonl")] == [0] * 4 + [1] * 4 + [2] * 4


def test_the_models_answer_replaces_the_last_answers_of_a_chat(tokenizer):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    rows = [("1", {"messages": [user, answer, user, answer, answer]}), ("2", {"prompt": "hi"})]
    prompts, duplicates = prepare_prompts(rows, tokenizer, system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert [p.messages for p in prompts] == [[system, user, answer, user], [system, user]]
    assert tokenizer.decode(prompts[1].input_ids).endswith("<s>user\nhi</s>\n<s>assistant\n")
    assert duplicates == 0


def test_earlier_answers_in_a_prompt_are_marked_as_not_the_models_own(tokenizer):
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    prompts, _ = prepare_prompts([("1", {"messages": [user, answer, user]}), ("2", {"prompt": "hi"})], tokenizer)
    assert [prompt.row("my answer").get("last_answer_only", False) for prompt in prompts] == [True, False]


def test_answers_that_the_template_does_not_let_tell_from_the_prompt_are_left_out_and_counted(files, tmp_path):
    model = shutil.copytree(files["model"], tmp_path / "model")
    # The prompt is shown otherwise once it has an answer.
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if add_generation_prompt %}? {% endif %}{{ m['content'] }}</s>{% endfor %}"
    )
    distill(settings(files, tmp_path / "a.jsonl", model=str(model), max_prompts=12))
    answers = counts(tmp_path / "a.jsonl")
    assert answers["rejected_untrainable"] > 9
    assert answers["kept"] == 0


def test_a_prompt_that_the_template_refuses_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"p.jsonl, line 7: messages: the tokenizer's .* roles must alternate"):
        prepare_prompts([("p.jsonl, line 7", {"prompt": "hi"})], tokenizer)


@pytest.mark.parametrize("change", ["layers", "template"])
def test_answers_of_another_model_or_template_are_not_taken_for_finished(files, tmp_path, change):
    model = shutil.copytree(files["model"], tmp_path / "model")
    run = settings(files, tmp_path / "a.jsonl", model=str(model), max_prompts=4)
    distill(run)
    if change == "layers":  # as after merging an adapter: the unembedding is the same
        weights = load_file(model / "model.safetensors")
        weights = {name: tensor * 1.5 if "mlp" in name else tensor for name, tensor in weights.items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant", "answer"))
    expected = {"layers": "weights_sha256", "template": "tokenized_prompts_sha256"}[change]
    with pytest.raises(FileExistsError, match=rf"made with other settings; {expected}"):
        distill(run)


def test_prompts_longer_than_the_context_are_left_out_and_counted(files, tmp_path):
    prompts = write(tmp_path / "p.jsonl", {"prompt": "a " * 40}, {"prompt": "b"}, {"prompt": "c " * 200})
    distill(settings(files, tmp_path / "a.jsonl", prompts=prompts))  # the context is 128 tokens
    assert counts(tmp_path / "a.jsonl")["too_long_prompts"] == 1
    assert [row["prompt_index"] for row in read_jsonl(tmp_path / "a.jsonl")] == [0, 1]
    with pytest.raises(ValueError, match=r"expected at most 8: the model's context of 128 without max_new_tokens=120"):
        distill(settings(files, tmp_path / "b.jsonl", prompts=prompts, max_new_tokens=120))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no rows"),
        ([{"prompt": "a"}, {"question": "b"}], r"line 2: got keys \['question'\]"),
        ([{"prompt": "a"}, ["b"]], "line 2: got a list"),
        ([{"prompt": "  "}], "line 1: prompt: got '  '"),
        ([{"messages": [{"role": "user", "content": 3}]}], "line 1: messages"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: messages: expected a message of the user"),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(files, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        distill(settings(files, tmp_path / "a.jsonl", prompts=write(tmp_path / "p.jsonl", *rows)))
    assert not (tmp_path / "a.jsonl").exists()


def test_bad_json_is_named_by_file_and_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 3: not valid JSON"):
        read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "missing.jsonl"}, "prompts: missing.jsonl is not a file"),
        ({"split": "train"}, "split: got 'train' for the file"),
        ({"column": "question"}, "line 1: column 'question'"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 128}, "max_new_tokens: got 128, expected less than 128"),
        ({"max_repetition": -1.0}, "max_repetition: got -1.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"backend": "magic"}, "backend: got 'magic'"),
        ({"output": "."}, "output: . is a folder"),
    ],
)
def test_bad_settings_are_named(files, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        distill(settings(files, **({"output": tmp_path / "a.jsonl"} | changes)))


def test_prompts_are_never_overwritten(files):
    with pytest.raises(ValueError, match="the prompts themselves"):
        distill(settings(files, files["prompts"]), overwrite=True)


def test_chats_need_a_chat_template(tokenizer):
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="here: messages: the tokenizer has no chat template"):
        prepare_prompts([("here", {"messages": [{"role": "user", "content": "a"}]})], plain)
    with pytest.raises(ValueError, match="system: got 'be brief'"):
        prepare_prompts([("here", {"prompt": "a"})], plain, system="be brief")


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tokenizer: got \d+ tokens, expected at most 64"):
        distill(settings(files, tmp_path / "a.jsonl", model=str(tmp_path / "model")))


def test_a_column_of_a_file_is_the_prompt(tmp_path):
    chat = [{"role": "user", "content": "b"}]
    path = write(tmp_path / "p.jsonl", {"question": "a", "prompt": "x"}, {"question": chat})
    assert [row for _, row in read_prompts(path, column="question").rows] == [{"prompt": "a"}, {"messages": chat}]


def test_prompts_come_from_any_dataset(files, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    write(
        tmp_path / "data" / "train.jsonl",
        {"question": "a", "n": 1},
        {"question": "b", "n": 2},
        {"question": "c", "n": 3},
    )
    expected = [{"prompt": "a"}, {"prompt": "b"}]
    source = read_prompts(f"hf:{tmp_path / 'data'}", column="question", limit=2)
    assert [row for _, row in source.rows] == expected
    assert source.name == "hf:data"
    with pytest.raises(ValueError, match="column: got None, expected one of question, n"):
        read_prompts(f"hf:{tmp_path / 'data'}")
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    saved = datasets.Dataset.from_dict({"messages": chats})
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "splits")
    for name, split in (("saved", None), ("splits", "test")):
        assert [row["messages"] for _, row in read_prompts(f"hf:{tmp_path / name}", split).rows] == chats
    distill(settings(files, tmp_path / "a.jsonl", prompts=f"hf:{tmp_path / 'splits'}", split="test"))
    assert counts(tmp_path / "a.jsonl")["answers"] == 2


@pytest.mark.parametrize(
    ("changes", "package"), [({"prompts": "hf:some/name"}, "datasets"), ({"backend": "vllm"}, "vllm")]
)
def test_a_missing_optional_package_is_named_with_its_install_command(files, tmp_path, monkeypatch, changes, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'peft-caft\[{package}\]'"):
        distill(settings(files, tmp_path / "a.jsonl", **changes))


# Interruptions


def command(files: dict[str, str], output: Path) -> list[str]:
    places = ["--model", files["model"], "--prompts", files["prompts"], "--output", str(output)]
    return ["peft-caft", "distill", *places, "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "4"]


def finish_distilling(files: dict[str, str], output: Path) -> str:
    return finish(command(files, output), output.with_suffix(".log"))


def kill_distilling_when(moment: Callable[[], bool], files: dict[str, str], output: Path) -> None:
    kill_when(moment, command(files, output), output.with_suffix(".log"))


def require_same(files: dict[str, str], output: Path) -> None:
    assert output.read_bytes() == Path(files["answers"]).read_bytes()
    assert counts(output) == counts(files["answers"])
    assert not [p.name for p in output.parent.iterdir() if p.name.startswith(".")]


def test_killed_at_any_moment_and_resumed_it_writes_the_same_file(files, tmp_path):
    output = tmp_path / "answers.jsonl"
    part = Parts(output).folder / "part-0.jsonl"
    randomness = random.Random(0)

    def lines() -> int:
        return part.read_bytes().count(b"\n") if part.exists() else 0

    kill_distilling_when(Parts(output).folder.exists, files, output)

    def after(wanted: int) -> bool:
        reached = lines() >= wanted
        time.sleep(0.02 * randomness.random() * reached)
        return reached

    for batches in (1, 4, 8):  # of 15
        kill_distilling_when(lambda wanted=batches: after(wanted), files, output)
        assert lines() < 15
        with open(part, "ab") as file:  # as if killed while writing a line
            file.write(b'{"batch": 3, "seconds": 0.1, "results": [{"prom'[: randomness.randrange(1, 47)])
        if batches == 4:  # as if another process had made them, of a run with more of them
            part.rename(part.with_name("part-5.jsonl"))
    assert " 0/60 " not in finish_distilling(files, output), "begins where the others ended"
    require_same(files, output)


def test_killed_between_output_and_provenance_it_joins_again(files, tmp_path):
    output = tmp_path / "answers.jsonl"
    blocked = output.with_suffix(".provenance.json")
    blocked.mkdir()  # the provenance cannot be renamed to it
    with pytest.raises(OSError, match="provenance"):
        distill(settings(files, output))
    assert output.exists()
    blocked.rmdir()
    output.write_text("")  # is written anew, whatever it holds
    distill(settings(files, output))
    require_same(files, output)


def test_a_finished_output_is_left_alone_and_never_replaced_unasked(files, tmp_path):
    output = tmp_path / "answers.jsonl"
    first = distill(settings(files, output, max_prompts=8))
    written = output.stat().st_mtime_ns
    assert distill(settings(files, output, max_prompts=8)) == first
    assert output.stat().st_mtime_ns == written
    with pytest.raises(
        FileExistsError, match=r"answers.jsonl exists, made with other settings; temperature: got 0.5, expected 1.0"
    ):
        distill(settings(files, output, max_prompts=8, temperature=0.5))
    distill(settings(files, output, max_prompts=8, temperature=0.5), overwrite=True)
    assert output.stat().st_mtime_ns != written
    foreign = write(tmp_path / "foreign.jsonl", {"text": "mine"})
    with pytest.raises(FileExistsError, match=r"foreign.jsonl exists\. Choose another output"):
        distill(settings(files, foreign))


def test_an_interrupted_run_is_not_taken_up_with_other_settings(files, tmp_path):
    output = tmp_path / "answers.jsonl"
    kill_distilling_when((Parts(output).folder / "part-0.jsonl").exists, files, output)
    with pytest.raises(FileExistsError, match=r"interrupted run with other settings; seed: got 3, expected 0"):
        distill(settings(files, output, seed=3))
    other = write(tmp_path / "prompts.jsonl", {"prompt": "another"})
    with pytest.raises(FileExistsError, match="prompts_sha256"):
        distill(settings(files, output, prompts=other))
    distill(settings(files, output, prompts=other), overwrite=True)
    assert len(read_jsonl(output)) == 1


def test_two_runs_into_one_output_do_not_mix(files, tmp_path):
    parts = Parts(tmp_path / "answers.jsonl")
    parts.folder.mkdir()
    with parts.appending(3), pytest.raises(BlockingIOError, match="is being written by another process"):
        distill(settings(files, parts.output))
    distill(settings(files, parts.output))
    require_same(files, parts.output)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of four pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_finished(files, small_disk):
    output = small_disk / "answers.jsonl"
    with pytest.raises(OSError, match=r"the disk of .* is full\. All batches that were finished are kept"):
        distill(settings(files, output))
    part = Parts(output).folder / "part-0.jsonl"
    assert part.read_bytes().count(b"\n") > 2
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    distill(settings(files, output))
    require_same(files, output)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_two_processes_write_the_same_file_as_one(engine, files, tmp_path):
    """Whatever engine they are launched for: each holds the whole model."""
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("see `make test-optional`")
    output = tmp_path / "answers.jsonl"
    config = EXAMPLES / "accelerate" / f"{engine}.yaml"
    if engine == "fsdp1":
        config = fsdp1_config(tmp_path)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    result = subprocess.run(
        [sys.executable, *launcher, "--main_process_port", "0", "-m", "peft_caft.cli", *command(files, output)[1:]],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert "/32 [" in result.stderr, "the first process answers 8 of 15 batches"
    assert result.stdout.count("rows written") == 1
    require_same(files, output)
