"""``peft-caft evaluate`` on a tiny checkpoint: what it writes, against the model asked row by row; kills; refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_caft import CAFTConfig
from peft_caft.evaluation.evaluator import length_group
from peft_caft.evaluation.reference_losses import answer_losses, encode_answers
from peft_caft.evaluation.settings import EvaluationSettings
from peft_caft.evaluation.task import load_task
from peft_caft.evaluation.task_building import build_task
from peft_caft.hub.merging import merge
from peft_caft.training.generation import TransformersBackend

from ..support import toy_task
from ..support.commands import peft_caft
from ..support.forked_command import finish, kill_when
from ..support.tiny_checkpoint import save_checkpoint

TOY = Path(toy_task.__file__)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a CAFT adapter that changes it much, and the data of the toy task."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = save_checkpoint(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(base, CAFTConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder / "adapter")
    build_task(load_task(TOY), folder / "data", {"test": 30})
    return {
        "model": model,
        "adapter": str(folder / "adapter"),
        "data": str(folder / "data" / "test.jsonl"),
        "folder": folder,
    }


def evaluated(files, output: Path, *options: str, model: bool = True, expect: int = 0) -> str:
    command = ["evaluate", "--task", str(TOY), "--data", files["data"], "--output", str(output), "--batch-size", "4"]
    return peft_caft(*command, *(["--model", files["model"]] if model else []), *options, expect=expect)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plain(files):
    output = files["folder"] / "plain"
    return output, evaluated(files, output)


def test_rows_are_in_the_order_of_the_data_and_their_answers_the_models_own(files, plain):
    results = lines(plain[0])
    data = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    assert [result["row"] for result in results] == list(range(30))
    assert [result["reference"] for result in results] == [row["messages"][-1]["content"] for row in data]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(files["model"]),
        AutoTokenizer.from_pretrained(files["model"]),
    )
    for row, result in list(zip(data, results, strict=True))[::7]:
        inputs = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert result["answer"] == tokenizer.decode(output, skip_special_tokens=True)
        assert result["generated_tokens"] == len(output)


def test_losses_are_those_of_each_row_alone_up_to_the_end_of_the_answer(files, plain):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(files["model"]),
        AutoTokenizer.from_pretrained(files["model"]),
    )
    data = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    for row, result in zip(data, lines(plain[0]), strict=True):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(row["messages"][-1]["content"] + "</s>")["input_ids"]
        input_ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = float(model(input_ids=input_ids, labels=labels).loss.detach())
        assert len(result["answer_losses"]) == len(answer)
        assert result["scores"]["cross_entropy"] == pytest.approx(loss, rel=1e-4)
        assert result["scores"]["answer_cross_entropy"] == pytest.approx(loss * len(answer), rel=1e-4)


def test_record_and_report_hold_the_means_of_the_rows(plain):
    output, printed = plain
    results, record = lines(output), json.loads((output / "evaluation.json").read_text())
    exact = [result["scores"]["exact"] for result in results]
    assert record["metrics"]["exact"]["mean"] == pytest.approx(sum(exact) / 30)
    losses = [loss for result in results for loss in result["answer_losses"]]
    assert record["metrics"]["cross_entropy"]["mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    defined = [result["scores"]["length"] for result in results if result["scores"]["length"] is not None]
    assert record["metrics"]["length"]["rows"] == len(defined) == 15
    assert record["metrics"]["length"]["mean"] == pytest.approx(sum(defined) / 15)
    assert record["settings"]["model"] == "model"
    groups = record["groups"]["tokens of the reference"]
    assert sum(group["rows"] for group in groups.values()) == 30
    assert len(groups) > 1
    for value, group in groups.items():
        own = [r["scores"]["exact"] for r in results if length_group(len(r["answer_losses"])) == value]
        assert group["metrics"]["exact"]["mean"] == pytest.approx(sum(own) / len(own))
    assert (output / "evaluation.md").read_text(encoding="utf-8") in printed
    assert "| exact " in printed
    assert not list(output.glob(".*"))


def test_adapter_and_its_merged_model_are_evaluated_alike_and_unlike_their_base(files, plain):
    merged = str(files["folder"] / "merged")
    merge(files["adapter"], merged)
    evaluated(files, files["folder"] / "of-adapter", "--adapter", files["adapter"], model=False)
    evaluated(files, files["folder"] / "of-merged", "--model", merged, model=False)
    base, adapter, whole = (
        lines(o) for o in (plain[0], files["folder"] / "of-adapter", files["folder"] / "of-merged")
    )
    for one, two in zip(adapter, whole, strict=True):
        assert one["answer"] == two["answer"]
        assert one["answer_losses"] == pytest.approx(two["answer_losses"], abs=1e-3)
    assert [r["answer_losses"] for r in base] != [r["answer_losses"] for r in adapter]
    record = json.loads((files["folder"] / "of-adapter" / "evaluation.json").read_text())
    assert record["settings"]["adapter"] == "adapter"


def test_without_answers_there_are_the_losses_alone(files, plain, tmp_path):
    printed = evaluated(files, tmp_path / "out", "--no-answers")
    results = lines(tmp_path / "out")
    assert [result["answer_losses"] for result in results] == [result["answer_losses"] for result in lines(plain[0])]
    assert {result["answer"] for result in results} == {None}
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(record["metrics"]) == ["cross_entropy", "answer_cross_entropy"]
    assert record["generated_tokens"] == 0
    assert "without answers of the model" in printed
    assert "- answer:" not in printed


def test_finished_evaluation_is_shown_again_and_other_settings_are_refused(files, plain):
    output, printed = plain
    before = (output / "rows.jsonl").stat().st_mtime_ns
    assert evaluated(files, output) == printed[printed.index("# model on repeat") :]
    assert (output / "rows.jsonl").stat().st_mtime_ns == before
    refused = evaluated(files, output, "--max-new-tokens", "3", expect=1)
    assert "max_new_tokens: got 3, expected 6" in refused
    refused = evaluated(files, output, "--adapter", files["adapter"], expect=1)
    assert "adapter: got 'adapter', expected None" in refused
    assert "--overwrite" in refused


class Killed(BaseException):
    """What no code catches."""


def test_broken_evaluation_goes_on_where_it_was_and_ends_as_an_unbroken_one(files, plain, tmp_path, monkeypatch):
    output = tmp_path / "broken"
    part = output / ".rows.jsonl.parts" / "part-0.jsonl"
    answers, asked = TransformersBackend.answers, []

    def counted(backend, prompts, seed):
        asked.append(len(prompts))
        if len(asked) == 4:
            raise Killed
        return answers(backend, prompts, seed)

    monkeypatch.setattr(TransformersBackend, "answers", counted)
    with pytest.raises(Killed):
        evaluated(files, output)
    assert not (output / "rows.jsonl").exists()
    assert not (output / "evaluation.json").exists()
    assert part.read_bytes().count(b"\n") == 3
    with part.open("ab") as file:
        file.write(b'{"batch": 7, "results": [{"row')  # what a kill in the midst of writing leaves
    refused = evaluated(files, output, "--temperature", "1", expect=1)
    assert "interrupted run with other settings; temperature: got 1.0, expected 0.0" in refused
    evaluated(files, output)
    assert len(asked) == 4 + 5  # of eight batches, three are not answered again
    assert (output / "rows.jsonl").read_bytes() == (plain[0] / "rows.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_evaluation_goes_on(files, plain, tmp_path):
    output = tmp_path / "killed"
    part = output / ".rows.jsonl.parts" / "part-0.jsonl"
    command = ["peft-caft", "evaluate", "--task", str(TOY), "--data", files["data"], "--model", files["model"]]
    command += ["--output", str(output), "--batch-size", "4"]
    kill_when(lambda: part.is_file() and part.read_bytes().count(b"\n") >= 2, command, tmp_path / "log")
    assert not (output / "rows.jsonl").exists()
    finish(command, tmp_path / "log")
    assert (output / "rows.jsonl").read_bytes() == (plain[0] / "rows.jsonl").read_bytes()


def test_changed_data_and_changed_task_are_not_gone_on_with(files, plain, tmp_path):
    output = shutil.copytree(plain[0], tmp_path / "copy")
    data = tmp_path / "test.jsonl"
    data.write_text(Path(files["data"]).read_text().replace("ethanol", "methane"))
    assert "data_sha256: got" in evaluated(files | {"data": str(data)}, output, expect=1)
    task = tmp_path / "task.py"
    task.write_text(TOY.read_text() + "\n# changed\n")
    assert "task_sha256: got" in evaluated(files, output, "--task", str(task), expect=1)
    assert "exact" in evaluated(files, output, "--task", str(task), "--overwrite")


def test_first_rows_and_sampled_answers(files, plain, tmp_path):
    evaluated(files, tmp_path / "first", "--max-rows", "8")
    assert [r["answer"] for r in lines(tmp_path / "first")] == [r["answer"] for r in lines(plain[0])[:8]]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        evaluated(files, tmp_path / name, "--max-rows", "8", "--temperature", "1.0", "--seed", seed)
    a, b, c = ([r["answer"] for r in lines(tmp_path / name)] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model: got neither --model nor --adapter"),
        (["--adapter", "missing"], "adapter: 'missing', revision main, is not in the local cache"),
        (["--model", "{model}", "--task", "missing.py"], "task: "),
        (["--model", "{model}", "--data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "{model}", "--batch-size", "0"], "batch_size: got 0"),
        (["--model", "{model}", "--max-new-tokens", "500"], "row 1: its prompt of"),
    ],
)
def test_wrong_option_is_named_without_traceback(options, message, files, tmp_path):
    output = evaluated(files, tmp_path / "new", *(o.format(**files) for o in options), model=False, expect=1)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"length": [len(a)', '"size": [len(a)', "expected 4 values for each of ['exact', 'length']"),
        ('row["number"] % 2', 'row["nummer"] % 2', "'repeat' asked for 'nummer'"),
        ('Metric("exact"', 'Metric("ended"', "metrics: 'ended' of 'repeat' is measured for every task"),
    ],
)
def test_mistake_in_a_task_is_told_as_such(old, new, message, files, tmp_path):
    task = tmp_path / "task.py"
    assert old in TOY.read_text()
    task.write_text(TOY.read_text().replace(old, new))
    output = evaluated(files, tmp_path / "new", "--task", str(task), expect=1)
    assert message in output
    assert "Traceback" not in output


def test_row_without_an_answer_is_named(files, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"text": "only text"}\n')
    assert "row 2: got keys ['text']" in evaluated(files | {"data": str(data)}, tmp_path / "new", expect=1)


def test_losses_do_not_depend_on_the_rows_beside(files):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(files["model"]).eval(),
        AutoTokenizer.from_pretrained(files["model"]),
    )
    rows = [{"prompt": "a " * n, "completion": "ethanol " * m} for n, m in ((1, 9), (20, 1), (7, 3), (2, 1))]
    encoded = encode_answers(rows, tokenizer, [1])
    together = answer_losses(model, encoded, 0)
    for own, row in zip(together, encoded, strict=True):
        (alone,) = answer_losses(model, [row], 0)
        assert own == pytest.approx(alone, rel=1e-5)
        assert len(own) == len(row.answer)


def test_model_that_computes_all_logits_gives_the_same_losses(files):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(files["model"]).eval(),
        AutoTokenizer.from_pretrained(files["model"]),
    )
    encoded = encode_answers([{"prompt": "b c", "completion": "ethanol"}], tokenizer, [1])
    expected, forward = answer_losses(model, encoded, 0), model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    assert answer_losses(model, encoded, 0)[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "group"), [(1, "1"), (2, "2 to 4"), (4, "2 to 4"), (5, "5 to 8"), (128, "65 to 128"), (129, "over 128")]
)
def test_lengths_are_grouped(tokens, group):
    assert length_group(tokens) == group


def test_tokenizer_beside_the_adapter_asks_and_scores(files, plain, tmp_path):
    """Its chat template is another one, so that every prompt is."""
    adapter = tmp_path / "adapter"
    shutil.copytree(files["adapter"], adapter)
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    evaluated(files, tmp_path / "base-template", "--adapter", str(adapter), "--no-answers", model=False)
    tokenizer.chat_template = "MINE " + tokenizer.chat_template
    tokenizer.save_pretrained(adapter)
    evaluated(files, tmp_path / "own-template", "--adapter", str(adapter), "--no-answers", model=False)
    data = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files["model"]), adapter)
    encoded = encode_answers(data, tokenizer, [1])
    expected = [sum(found) / len(found) for found in answer_losses(tuned.eval(), encoded, 0)]
    found = [
        [line["scores"]["cross_entropy"] for line in lines(tmp_path / f"{name}-template")] for name in ("own", "base")
    ]
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert found[1] != pytest.approx(expected, rel=1e-2)


def test_adapter_with_an_added_token_is_evaluated_and_without_its_tokenizer_refused(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    model.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[300], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    output = evaluated(files, tmp_path / "out", "--adapter", str(tmp_path / "adapter"), "--no-answers", expect=1)
    assert "if tokens were added, save their tokenizer beside the adapter" in output
    tokenizer.save_pretrained(tmp_path / "adapter")
    evaluated(files, tmp_path / "out", "--adapter", str(tmp_path / "adapter"), "--no-answers")


def test_adapter_in_place_of_a_model_is_refused(files, tmp_path):
    assert "model: got" in evaluated(files, tmp_path, "--model", files["adapter"], model=False, expect=1)


@pytest.mark.parametrize("option", ["max_new_tokens", "temperature", "seed"])
def test_options_of_answers_without_answers_are_refused(option):
    with pytest.raises(ValueError, match=f"^{option}: got 1 with --no-answers"):
        EvaluationSettings(task="", data="", output="", answers=False, **{option: 1})
