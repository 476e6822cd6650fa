"""``peft-caft inspect``: what an artifact is, and whether it fits a base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.cli.app import app
from peft_caft.hub.inspection import inspect

from ..support.tiny_checkpoint import save_checkpoint

NUMBERS = {
    "heads": [{"tokens_ahead": k, "cross_entropy": 3.0 + k, "top1": 0.25, "top5": 0.5, "tokens": 10} for k in (2, 3)],
    "acceptance_length": 0.5,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Base models, heads and adapters of one of them."""
    folder = tmp_path_factory.mktemp("inspect")
    paths = {name: str(folder / name) for name in ("model", "other", "wider", "heads", "caft", "lora")}
    save_checkpoint(Path(paths["model"]))
    save_checkpoint(Path(paths["other"]), seed=1)
    save_checkpoint(Path(paths["wider"]), hidden_size=64)
    base = AutoModelForCausalLM.from_pretrained(paths["model"])
    heads = AuxiliaryHeads.from_base_model(base, 2)
    heads.config.training = {
        "data": [{"file": "answers.jsonl", "rows": 7, "tokens": 90, "supervised_tokens": 40, "sha256": "ab" * 32}],
        "targets": "soft",
        "evaluations": [{"name": "answers", "before": NUMBERS, "after": NUMBERS}],
        "command": "peft-caft train-heads",
    }
    heads.save_pretrained(paths["heads"])
    config = CAFTConfig(heads=paths["heads"], num_auxiliary_heads=2, target_modules="all-linear", r=4)
    get_peft_model(base, config).save_pretrained(paths["caft"])
    base = AutoModelForCausalLM.from_pretrained(paths["model"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(paths["lora"])
    return paths


def run(*arguments: str, expect: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == expect, (result.output, result.exception)
    return result.output


def test_heads_are_described_with_provenance_and_figures(files):
    output = run(files["heads"])
    assert "2 auxiliary heads, for 2 to 3 tokens ahead" in output
    count = sum(t.numel() for t in load_file(Path(files["heads"], "model.safetensors")).values())
    assert f"{count:,} in" in output
    assert "F32" in output
    assert "`answers.jsonl`, 7 rows, 90 tokens, 40 of them supervised" in output
    assert "| 2                   | 5.000 -> 5.000" in output
    assert "Acceptance length: 0.50 -> 0.50 of 2 heads." in output


def test_an_adapter_is_described_with_its_heads(files):
    caft, lora = run(files["caft"]), run(files["lora"])
    assert "trained with CAFT; plain PEFT loads it" in caft
    assert "rank 4" in caft
    assert files["heads"] in caft
    assert "beta 0.01, alpha 0.8, gamma reflected_sine" in caft
    assert "something else than CAFT" in lora
    assert "auxiliary loss" not in lora


@pytest.mark.parametrize("artifact", ["heads", "caft", "lora"])
def test_what_was_made_for_a_model_fits_it(artifact, files):
    assert "yes" in run(files[artifact], "--model", files["model"])


def test_an_adapter_of_the_unembedding_fits_its_model(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"], r=2)).save_pretrained(tmp_path)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert inspect(str(tmp_path), files["model"]).misfit is None


def test_an_adapter_of_another_kind_is_refused_by_name(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    get_peft_model(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_type: got 'IA3' in adapter_config.json"):
        inspect(str(tmp_path))


def test_heads_of_another_model_do_not_fit(files):
    assert "unembedding_fingerprint" in run(files["heads"], "--model", files["other"], expect=1)
    assert "hidden_size: got 64" in run(files["heads"], "--model", files["wider"], expect=1)


def test_heads_fit_a_resized_vocabulary_with_a_note(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    base.resize_token_embeddings(310)
    base.save_pretrained(tmp_path)
    found = inspect(files["heads"], str(tmp_path))
    assert found.misfit is None
    assert "yes. vocab_size: got 310 in the base model, 300 in the heads" in found.text()


def test_an_adapter_of_another_size_does_not_fit(files):
    output = run(files["caft"], "--model", files["wider"], expect=1)
    assert "tensor(s) differ; first" in output


def test_tied_and_untied_unembeddings_are_read_without_the_model(files, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # would fail
    assert inspect(files["heads"], files["model"]).misfit is None
    monkeypatch.undo()
    save_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    AuxiliaryHeads.from_base_model(base, 2, "residual").save_pretrained(tmp_path / "heads")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert inspect(str(tmp_path / "heads"), str(tmp_path / "tied")).misfit is None


def test_sharded_base_models_are_compared_too(files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(files["model"])
    base.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert inspect(files["heads"], str(tmp_path / "sharded")).misfit is None


def test_json_holds_the_whole_configuration(files):
    record = json.loads(run(files["heads"], "--json", "--model", files["model"]))
    assert record["misfit"] is None
    assert record["config"]["training"]["targets"] == "soft"
    assert json.loads(run(files["caft"], "--json"))["config"]["caft_config"]["aux_loss_decay"] == 0.8


def test_damaged_weights_are_an_error(files, tmp_path):
    heads = shutil.copytree(files["heads"], tmp_path / "heads")
    weights = heads / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged. Its sha256 is"):
        inspect(str(heads))
    adapter = shutil.copytree(files["lora"], tmp_path / "lora")
    (adapter / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: damaged"):
        inspect(str(adapter))


def test_heads_whose_layers_are_of_another_shape_do_not_fit(files, tmp_path):
    heads = shutil.copytree(files["heads"], tmp_path / "heads")
    weights = load_file(heads / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: torch.zeros(3, 3)}, heads / "model.safetensors")
    config = json.loads((heads / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | {"weights_sha256": None}))
    misfit = inspect(str(heads), files["model"]).misfit
    assert misfit is not None
    assert "got (3, 3)" in misfit


def test_a_folder_of_neither_kind_and_pickled_weights_are_refused(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"artifact: neither adapter_config.json nor config.json"):
        inspect(str(tmp_path))
    adapter = shutil.copytree(files["lora"], tmp_path / "lora")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"Pickled weights \(.bin\) are not read"):
        inspect(str(adapter))
    with pytest.raises(ValueError, match="configuration of a whole model"):
        inspect(files["model"])  # a model's folder also has a config.json and a model.safetensors
