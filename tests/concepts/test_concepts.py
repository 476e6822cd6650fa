"""`peft-caft concepts`: its figures against plain loops over full logits, its rule for n, and what it writes."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_caft.concepts.alignment import AlignedRow, align
from peft_caft.concepts.concepts import _adapted, _tokenizer
from peft_caft.concepts.density import Density, density, pieces, recommended_n
from peft_caft.concepts.head_knowledge import head_knowledge, unigram_entropy
from peft_caft.concepts.losses import ConceptLosses, place_of
from peft_caft.concepts.settings import ConceptsSettings
from peft_caft.concepts.terms import prose_terms
from peft_caft.concepts.token_scores import score_tokens
from peft_caft.heads.auxiliary_heads import AuxiliaryHeads
from peft_caft.training.data import collator, read_jsonl

from ..support.commands import peft_caft
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer, write_chats

ODD = "<script>alert('x')</script> & \"quotes\" 🙂 שלום עולם \x07 | ` " + "Donaudampfschiff" * 8


@pytest.fixture(scope="module")
def rows() -> list[AlignedRow]:
    words = ["benzene serine", "xylophone zebra", "pentane, 字 a b", "toluenes aniline phenols", "glycine"]
    data = [{"prompt": f"name {index}", "completion": f" {word}."} for index, word in enumerate(words)]
    found = align(data, tiny_tokenizer(), prose_terms, 60)
    assert len({len(row.targets) for row in found}) > 3  # padding matters
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A checkpoint, data with an odd row in front, two adapters and heads."""
    folder = tmp_path_factory.mktemp("concepts")
    model = save_checkpoint(folder / "model", max_position_embeddings=512)
    data = folder / "chats.jsonl"
    write_chats(data, 12)
    odd = {"messages": [{"role": "user", "content": "<b>bold"}, {"role": "assistant", "content": ODD}]}
    data.write_text(json.dumps(odd) + "\n" + data.read_text())
    base = AutoModelForCausalLM.from_pretrained(model)
    for name, seed in (("lora", 1), ("caft", 2)):
        torch.manual_seed(seed)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(folder / name)
        base = adapted.unload()
    AuxiliaryHeads.from_base_model(base, num_heads=2).save_pretrained(folder / "heads")
    return {"data": str(data)} | {name: str(folder / name) for name in ("model", "lora", "caft", "heads")}


def naive(model, row: AlignedRow) -> tuple[list[float], list[bool]]:
    """Cross entropies and hits by a loop over all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    losses, hits = [], []
    for target in row.targets:
        token, before = row.input_ids[target.position], logits[target.position - 1]
        losses.append(float(torch.logsumexp(before, 0) - before[token]))
        hits.append(int(before.argmax()) == token)
    return losses, hits


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.linspace(-2, 2, outputs.logits.shape[-1])
        return outputs


@pytest.mark.parametrize("changed", ["", "shifted logits", "adapter", "trained lm_head"])
def test_scores_are_those_of_full_logits(changed, rows):
    """Also of models that do more after their norm than the chunks know, which are scored by their own logits."""
    model = tiny_llama().eval()
    if changed == "shifted logits":
        model.__class__ = ShiftedLogits
    torch.manual_seed(0)
    if changed in ("adapter", "trained lm_head"):
        targets = ["q_proj", "down_proj"] + ["lm_head"] * (changed == "trained lm_head")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    plain = tiny_llama().eval()
    found = score_tokens(model, rows, collator(tiny_tokenizer()), batch_size=2)
    for row, scores in zip(rows, found, strict=True):
        losses, hits = naive(model, row)
        np.testing.assert_allclose(scores.cross_entropy, losses, atol=1e-5)
        assert scores.correct.tolist() == hits
        assert bool(changed) == (not np.allclose(scores.cross_entropy, naive(plain, row)[0], atol=1e-3))


def test_losses_by_place_are_those_of_a_plain_loop(rows):
    model = tiny_llama().eval()
    scores = score_tokens(model, rows, collator(tiny_tokenizer()))
    found = {line.place: line for line in ConceptLosses(rows).of([scores]).places}
    losses: dict[str, list[float]] = {place: [] for place in found}
    for row in rows:
        for target, loss in zip(row.targets, naive(model, row)[0], strict=True):
            losses["all"].append(loss)
            losses[place_of(row, target)].append(loss)
    assert {place: line.tokens for place, line in found.items()} == {place: len(own) for place, own in losses.items()}
    assert min(len(losses[place]) for place in ("single", "1", "2", "3", "5+", "between", "special")) > 0
    for place, own in losses.items():
        if own:
            assert found[place].cross_entropy.mean == pytest.approx(np.mean(own), abs=1e-5)
            assert found[place].share_of_loss == pytest.approx(sum(own) / sum(losses["all"]), abs=1e-5)
            low, high = found[place].cross_entropy.low, found[place].cross_entropy.high
            assert low is None or low <= np.mean(own) <= high
    assert found["all"].cross_entropy.low < found["all"].cross_entropy.high
    assert sum(line.tokens for place, line in found.items() if place != "all") == found["all"].tokens


def test_joint_probability_of_a_term_is_the_product_of_its_tokens(rows):
    model = tiny_llama().eval()
    scores = score_tokens(model, rows, collator(tiny_tokenizer()))
    found = {line.length: line for line in ConceptLosses(rows).of([scores]).terms}
    logs: dict[str, list[float]] = {length: [] for length in found}
    for row in rows:
        losses, _ = naive(model, row)
        for term in row.terms:
            size = len(term.targets)
            product = math.prod(math.exp(-losses[index]) for index in term.targets)
            for length in ("2+",) * (size > 1) + ((str(size),) if 1 < size < 5 else ("5+",) * (size > 4)):
                logs[length].append(math.log(product))
    assert {length: line.terms for length, line in found.items()} == {length: len(own) for length, own in logs.items()}
    for length, own in logs.items():
        if own:
            assert found[length].log_probability.mean == pytest.approx(np.mean(own), abs=1e-4)


def test_whole_term_is_right_where_all_of_its_tokens_are(rows):
    """With scores made by hand: one wrong token spoils its term and no other."""
    scores = score_tokens(tiny_llama().eval(), rows, collator(tiny_tokenizer()))
    for score in scores:
        score.correct[:] = True
    losses = ConceptLosses(rows)
    assert losses.of([scores]).terms[0].accuracy.mean == 1.0
    several = [(row, term) for row in range(len(rows)) for term in rows[row].terms if len(term.targets) > 1]
    row, term = several[1]
    scores[row].correct[term.targets[-1]] = False
    assert losses.of([scores]).terms[0].accuracy.mean == pytest.approx(1 - 1 / len(several))
    single = next((row, t) for row in range(len(rows)) for t in rows[row].terms if len(t.targets) == 1)
    scores[single[0]].correct[single[1].targets[0]] = False
    assert losses.of([scores]).terms[0].accuracy.mean == pytest.approx(1 - 1 / len(several))


def test_models_are_compared_row_by_row(rows):
    first, second = (score_tokens(tiny_llama(seed=seed).eval(), rows, collator(tiny_tokenizer())) for seed in (0, 1))
    losses = ConceptLosses(rows)
    found = losses.compare("a", [first], "b", [second])
    one, two = losses.of([first]), losses.of([second])
    for before, after in zip(one.places, two.places, strict=True):
        difference = found.cross_entropy[before.place]
        if before.tokens:
            expected = after.cross_entropy.mean - before.cross_entropy.mean
            assert difference.mean == pytest.approx(expected)
            assert difference.low is None or difference.low <= expected <= difference.high
        else:
            assert difference is None
    assert found.log_probability["2+"].mean == pytest.approx(
        two.terms[0].log_probability.mean - one.terms[0].log_probability.mean
    )
    same = losses.compare("a", [first], "b", [first])
    differences = [found for found in same.log_probability.values() if found]
    assert {found.mean for found in differences} == {0}
    assert {(found.low, found.high) for found in differences} == {(0, 0), (None, None)}  # the latter of a single row


def test_runs_of_a_model_are_averaged_and_widen_its_intervals(rows):
    """By hand: one run is a nat a token better than the reference, the other is as good."""
    first = score_tokens(tiny_llama().eval(), rows, collator(tiny_tokenizer()))
    better = [replace(score, cross_entropy=score.cross_entropy - 1) for score in first]
    losses = ConceptLosses(rows)
    one, both = losses.of([first]), losses.of([first, better])
    assert both.places[0].tokens == one.places[0].tokens
    assert both.places[0].cross_entropy.mean == pytest.approx(one.places[0].cross_entropy.mean - 0.5)
    assert both.places[0].share_of_loss == one.places[0].share_of_loss == 1
    sure = losses.compare("a", [first], "b", [better, better])
    unsure = losses.compare("a", [first, first], "b", [first, better])
    assert (sure.runs, unsure.runs) == (2, 2)
    for found, mean, low, high in ((sure, -1, -1, -1), (unsure, -0.5, -1, 0)):
        difference = found.cross_entropy["all"]
        assert (difference.mean, difference.low, difference.high) == pytest.approx((mean, low, high))
    swapped = losses.compare("a", [better, first], "b", [first, better])  # so runs are paired in their order
    assert (swapped.cross_entropy["all"].low, swapped.cross_entropy["all"].high) == pytest.approx((-1, 1))


def test_name_given_twice_is_one_model_in_two_runs(files, tmp_path):
    common = ["concepts", "--data", files["data"], "--model", files["model"], "--resamples", "20", "--max-rows", "4"]
    common.append("--no-plots")
    adapters = [f"{name}={files[source]}" for name in ("LoRA", "CAFT") for source in ("lora", "caft")]
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    output = peft_caft(*common, *options, "--output", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "concepts.json").read_text())
    assert list(record["models"]) == ["base", "LoRA", "CAFT"]
    assert record["models"]["LoRA"] == record["models"]["CAFT"] != record["models"]["base"]
    assert record["comparisons"][1]["cross_entropy"]["all"]["mean"] == 0
    assert "over rows and 2 runs" in output


def test_density_counts_every_token_once(rows):
    found = density(rows)
    inside = sum(found.tokens_in(length) for length in found.terms)
    assert inside + found.between + found.special + found.cut == found.tokens == sum(len(row.targets) for row in rows)
    assert found.special == len(rows)
    assert found.term_count == 12
    assert found.multi_token_tokens == inside - found.tokens_in(1)
    assert found.continuing_tokens == sum(target.place > 1 for row in rows for target in row.targets)


def test_frequent_terms_show_the_pieces_that_make_them(rows):
    found = density([*rows, rows[1]])
    assert (found.frequent[0].count, found.frequent[1].count) == (2, 2)
    assert {found.frequent[0].text, found.frequent[1].text} == {"xylophone", "zebra"}
    for term in found.frequent:
        assert len(term.pieces) > 1
        assert "".join(term.pieces).replace("·", "") == term.text
    character = next(term for term in found.frequent if term.text == "字")
    assert character.pieces == ["字", "·", "·"]


def test_pieces_are_the_text(rows):
    for row in rows:
        assert "".join(pieces(row, tuple(range(len(row.targets))))).replace("·", "") == row.text


def counted(**terms: int) -> Density:
    return Density(1, 1000, {int(name[1:]): count for name, count in terms.items()}, 0, 0, 0, 0, 0, 0, [])


@pytest.mark.parametrize(
    ("terms", "most", "n", "length", "covered"),
    [
        ({"t1": 900, "t2": 45, "t5": 2}, 5, 2, 2, 0.9),  # 90 of 100 tokens: just enough
        ({"t2": 44, "t3": 4}, 5, 3, 3, 1.0),  # 88 of 100
        ({"t2": 10, "t4": 10, "t10": 1}, 5, 5, 10, 60 / 70),
        ({"t2": 10, "t4": 30, "t10": 1}, 5, 4, 4, 140 / 150),
        ({"t3": 10, "t9": 10}, 5, 5, 9, 0.25),  # more than the heads offer
        ({"t3": 10, "t9": 10}, 12, 9, 9, 1.0),
        ({"t3": 10}, 2, 2, 3, 0.0),
        ({"t1": 5}, 5, 2, None, None),
        ({}, 5, 2, None, None),
    ],
)
def test_recommended_n_reaches_the_end_of_nine_in_ten_tokens(terms, most, n, length, covered):
    found = recommended_n(counted(**terms), most)
    assert (found.n, found.length, found.most) == (n, length, most)
    assert found.covered == (None if covered is None else pytest.approx(covered))
    assert ("Heads for n =" in found.reason) == (length is not None and length > most)


def test_heads_are_measured_against_guessing_by_frequency(rows):
    tokens = [row.input_ids[target.position] for row in rows for target in row.targets]
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    assert unigram_entropy(rows) == pytest.approx(-sum(share * math.log(share) for share in shares))
    model = tiny_llama().eval()
    heads = AuxiliaryHeads.from_base_model(model, num_heads=2)
    found = head_knowledge(heads, model, rows, collator(tiny_tokenizer()), 2)
    assert [head.tokens_ahead for head in found] == [2, 3]
    for head in found:
        assert head.below_unigram == pytest.approx(unigram_entropy(rows) - head.cross_entropy)
        assert head.below_unigram < 0  # a random model knows less than the frequencies


class Page(HTMLParser):
    """What a browser makes of the page: elements, and the text of its token lines."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[tuple[str, dict]] = []
        self.lines: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attrs)))
        if tag == "p" and dict(attrs).get("class") == "tokens":
            self.lines.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "p" and a.get("class") == "tokens" for tag, a in self.open):
            self.lines[-1] += data


@pytest.fixture(scope="module")
def compared(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    adapters = ["--adapter", f"LoRA={files['lora']}", "--adapter", f"CAFT={files['caft']}", "--heads", files["heads"]]
    options = ["--examples", "3", "--batch-size", "4", "--resamples", "50", "--max-length", "100", "--unit", "prose"]
    output = peft_caft(
        *("concepts", "--data", files["data"], "--model", files["model"], *adapters, *options, "--output", str(folder))
    )
    return folder, output


def test_command_compares_lora_with_caft(files, compared):
    folder, output = compared
    assert {path.name for path in folder.iterdir()} == {
        *("concepts.json", "concepts.md", "concepts.html", "concept_density.png", "concept_losses.png")
    }
    record = json.loads((folder / "concepts.json").read_text())
    assert list(record["models"]) == ["base", "LoRA", "CAFT"]
    assert [(c["reference"], c["model"]) for c in record["comparisons"]] == [("base", "LoRA"), ("LoRA", "CAFT")]
    assert record["recommended"]["most"] == 3  # of two heads
    assert record["density"]["multi_token_tokens"] > 0
    for part in (
        "## Density",
        "## Where the loss sits",
        "## CAFT minus LoRA, paired by row",
        "know nothing of these data",
    ):
        assert part in output
    assert (folder / "concepts.md").read_text().strip() in output
    # The adapters are scored one after the other on the same base model, and leave it as it was.
    tokenizer, base = (
        AutoTokenizer.from_pretrained(files["model"]),
        AutoModelForCausalLM.from_pretrained(files["model"]),
    )
    own = align(read_jsonl(files["data"]), tokenizer, prose_terms, 100)
    for name, source in (("base", None), ("LoRA", files["lora"]), ("CAFT", files["caft"])):
        model = AutoModelForCausalLM.from_pretrained(files["model"]) if source else base
        if source:
            model.load_adapter(source)
        losses = [loss for row in own for loss in naive(model.eval(), row)[0]]
        overall = record["models"][name]["places"][0]
        assert overall["tokens"] == len(losses)
        assert overall["cross_entropy"]["mean"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_page_shows_the_text_of_the_answers_and_nothing_of_it_is_markup(compared):
    html = (compared[0] / "concepts.html").read_text()
    parsed = Page(html)
    assert not parsed.open  # everything is closed in order
    assert not {"script", "b", "img", "link"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(parsed.lines) == 3 * 5  # three models and two differences, of three rows
    shown = parsed.lines[0].replace("·", "").replace("↵", "")
    assert shown.startswith("<script>alert('x')</script> & \"quotes\" 🙂 שלום עולם ␇ | ` Donau")
    assert len(set(parsed.lines[:5])) == 1
    assert "\x07" not in html
    assert "&lt;b&gt;bold" in html  # of the prompt


def test_page_says_more_than_colours(compared):
    parsed = Page((compared[0] / "concepts.html").read_text())
    tokens = [attributes for _, attributes in parsed.tags if "data-v" in attributes]
    assert all(re.fullmatch(r"[+-]?\d+\.\d", token["data-v"]) for token in tokens)
    assert any(re.fullmatch(r"\d+\.\d\d nats, probability \d+\.\d%; 2nd of \d+ tokens", t["title"]) for t in tokens)
    for token in tokens:
        strength = float(token["style"].removeprefix("--x:"))
        value = float(token["data-v"])
        if token["data-v"][0] in "+-":
            assert strength == pytest.approx(min(1, abs(value) / 2), abs=0.03)
            assert ("better" in token["class"]) == (value < 0) or value == 0
        else:
            assert strength == pytest.approx(min(1, value / 6), abs=0.01)
    assert {"term missed"} <= {attributes.get("class") for _, attributes in parsed.tags}


def pixels(png: bytes) -> bytes:
    """The raw image data of a PNG."""
    data, position = b"", 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        if png[position + 4 : position + 8] == b"IDAT":
            data += png[position + 8 : position + 8 + length]
        position += length + 12
    return zlib.decompress(data)


@pytest.mark.parametrize("name", ["concept_density.png", "concept_losses.png"])
def test_plots_are_not_blank(name, compared):
    content = (compared[0] / name).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(set(pixels(content))) > 100


def test_plots_draw_the_figures(rows, monkeypatch):
    from peft_caft.concepts import plots as concept_plots

    figures = []
    monkeypatch.setattr(concept_plots, "save_figure", lambda figure, path: figures.append(figure))
    found = density(rows)
    concept_plots.plot_density("x.png", found, recommended_n(found))
    bars, coverage = figures[0].axes
    heights = [bar.get_height() for container in bars.containers for bar in container]
    assert sum(heights) == pytest.approx(1)
    assert heights[0] == pytest.approx(found.tokens_in(1) / found.tokens)
    assert coverage.get_lines()[0].get_ydata()[0] == found.covered(2)
    losses = ConceptLosses(rows)
    model = losses.of([score_tokens(tiny_llama().eval(), rows, collator(tiny_tokenizer()))])
    concept_plots.plot_losses("x.png", {"base": model}, [])
    points = figures[1].axes[0].get_lines()[0].get_ydata()
    assert points[0] == model.places[1].cross_entropy.mean  # one-token terms


def test_without_loss_the_tokenizer_is_enough(files, tmp_path):
    model = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(files["model"]).save_pretrained(model)
    common = ["concepts", "--data", files["data"], "--model", str(model), "--no-loss", "--no-plots", "--max-rows", "4"]
    output = peft_caft(*common, "--output", str(tmp_path / "out"))
    assert "## Recommended n" in output
    assert "Where the loss sits" not in output
    assert "Unit: prose (guessed" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"concepts.json", "concepts.md", "concepts.html"}
    parsed = Page((tmp_path / "out" / "concepts.html").read_text())
    assert len(parsed.lines) == 4
    assert any(attributes.get("title") == "2nd of 2 tokens" for _, attributes in parsed.tags)


def test_single_adapter_is_compared_with_the_base_model_and_may_be_a_whole_one(files, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=5, max_position_embeddings=512)
    common = ["concepts", "--data", files["data"], "--model", files["model"], "--no-plots", "--resamples", "20"]
    output = peft_caft(*common, "--adapter", f"tuned={other}", "--output", str(tmp_path / "out"))
    assert "## tuned minus base, paired by row" in output


def test_adapter_of_another_model_is_refused(files, tmp_path):
    adapted = get_peft_model(tiny_llama(hidden_size=16), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "small")
    common = ["concepts", "--data", files["data"], "--model", files["model"], "--no-plots", "--max-rows", "3"]
    output = peft_caft(*common, "--adapter", f"a={tmp_path / 'small'}", "--output", str(tmp_path / "out"), expect=1)
    assert "adapter a: " in output
    assert "cannot be loaded as an adapter of the base model" in output


def test_terms_of_the_data_cannot_break_the_tables(files, tmp_path):
    data = tmp_path / "odd.jsonl"
    data.write_text(json.dumps({"prompt": "q", "completion": "a|=|`b`||c " * 3, "complete": False}) + "\n")
    options = ["--no-loss", "--no-plots", "--unit", "code", "--output", str(tmp_path / "out")]
    peft_caft("concepts", "--data", str(data), "--model", files["model"], *options)
    text = (tmp_path / "out" / "concepts.md").read_text()
    lines = [line for line in text.split("## Most frequent")[1].splitlines() if line.startswith("|")]
    assert len(lines) > 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "lora"], "adapter: got 'lora', expected NAME=FOLDER"),
        (
            ["--adapter", "a=x", "--adapter", "b=y", "--adapter", "a=z"],
            "adapter: got 2 of 'a', 1 of 'b', expected as many",
        ),
        (["--adapter", "base=x"], "adapter: got the name 'base', which is the base model's"),
        (["--adapter", "a=missing-folder/"], "adapter a: neither adapter_config.json nor config.json"),
        (["--no-loss", "--heads", "h"], "heads: given with --no-loss"),
        (["--max-rows", "0"], "max_rows: got 0, expected a whole number of at least 1"),
        (["--examples", "-1"], "examples: got -1"),
        (["--data", "missing.jsonl"], "missing.jsonl is not a file"),
        (["--max-length", "3"], "none of 13 rows has a supervised token within max_length=3"),
    ],
)
def test_wrong_options_are_named_without_traceback(options, message, files, tmp_path):
    (tmp_path / "missing-folder").mkdir()
    options = [option.replace("missing-folder/", str(tmp_path / "missing-folder")) for option in options]
    data = [] if "--data" in options else ["--data", files["data"]]
    common = ["concepts", *data, "--model", files["model"], "--no-plots", "--output", str(tmp_path / "out")]
    output = peft_caft(*common, *options, expect=1)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_command_explains_itself():
    output = " ".join(peft_caft("concepts", "--help").split())
    for part in ("--no-loss", "NAME=FOLDER", "[default: auto]"):
        assert part in output


def test_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="unit: got 'music', expected one of 'auto', 'prose', 'code', 'chemistry'"):
        ConceptsSettings("data", "model", "output", unit="music")


def test_missing_matplotlib_is_found_out_at_once(files, tmp_path, monkeypatch):
    import sys

    for name in list(sys.modules):  # whatever earlier tests have imported
        if name.split(".")[0] == "matplotlib" or name in ("peft_caft.concepts.plots", "peft_caft.basics.plots"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    common = ["concepts", "--data", files["data"], "--model", "no-such-model", "--output", str(tmp_path / "out")]
    assert "Run: pip install matplotlib, or pass --no-plots" in peft_caft(*common, expect=1)


def test_tokenizer_beside_the_adapters_is_used_and_must_be_the_same(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    tokenizer.chat_template = "MINE " + tokenizer.chat_template
    for name in ("lora", "caft"):
        shutil.copytree(files[name], tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "lora")
    settings = {
        "data": files["data"],
        "model": files["model"],
        "adapter": [f"{name}={tmp_path / name}" for name in ("lora", "caft")],
    }
    with pytest.raises(ValueError, match=r"tokenizers of caft=.*caft and lora=.*lora differ in chat_template"):
        _tokenizer(ConceptsSettings(output="out", **settings))
    tokenizer.save_pretrained(tmp_path / "caft")
    assert _tokenizer(ConceptsSettings(output="out", **settings)).chat_template == tokenizer.chat_template


def test_embedding_that_an_adapter_holds_does_not_stay_in_the_base_model(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    before = base.get_input_embeddings().weight.detach().clone()
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(files["model"]), lora)
    adapted.get_input_embeddings().weight.data += 1
    adapted.save_pretrained(tmp_path / "adapter")
    settings = ConceptsSettings(files["data"], files["model"], "out")
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    with _adapted(base, "a", str(tmp_path / "adapter"), tokenizer, settings) as model:
        assert (model.get_input_embeddings().weight.cpu() - before).min() > 0.9
    assert torch.equal(base.get_input_embeddings().weight, before)


@pytest.mark.parametrize("option", ["batch_size", "resamples", "seed"])
def test_options_of_scores_without_scores_are_refused(option):
    with pytest.raises(ValueError, match=f"^{option}: got 7 with --no-loss"):
        ConceptsSettings("data", "model", "output", loss=False, **{option: 7})
