"""Heads belong to a base model, whose vocabulary may have another size by now."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.config import HeadsConfig, fingerprint
from peft_caft.heads.repository import _difference_of_bases

from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer
from ..support.tiny_models import VOCABULARY, tiny_model, tokens


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    AuxiliaryHeads.from_base_model(tiny_model("llama"), 2).save_pretrained(folder)
    return folder


def resized(*sizes: int, **options):
    model = tiny_model("llama")
    for size in sizes:
        model.resize_token_embeddings(size, mean_resizing=False, **options)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: resized(VOCABULARY + 3),
        lambda: resized(VOCABULARY - 3),
        lambda: resized(VOCABULARY, pad_to_multiple_of=64),
        lambda: resized(VOCABULARY // 3),
        lambda: resized(120).bfloat16(),
    ],
    ids=["added", "trimmed", "padded", "a third", "half precision"],
)
def test_a_resized_vocabulary_is_allowed_with_both_sizes_named(model, heads):
    model = model()
    size = model.lm_head.out_features
    with pytest.warns(
        UserWarning, match=f"vocab_size: got {size} in the base model, {VOCABULARY} in the heads"
    ) as seen:
        loaded = AuxiliaryHeads.from_pretrained(heads, base_model=model)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, when they were loaded
        logits = loaded.logits(model, tokens() % size)
    assert logits[0].shape[-1] == size


def test_heads_predict_behind_a_resized_vocabulary_what_they_did_before(heads):
    before = AuxiliaryHeads.from_pretrained(heads, base_model=tiny_model("llama"))
    model = resized(VOCABULARY + 3)
    with pytest.warns(UserWarning, match="vocab_size"):
        after = AuxiliaryHeads.from_pretrained(heads, base_model=model)
    for old, new in zip(before.logits(tiny_model("llama"), tokens()), after.logits(model, tokens()), strict=True):
        torch.testing.assert_close(new[..., :VOCABULARY], old)


@pytest.mark.filterwarnings("error")
def test_tokens_that_were_added_and_removed_again_change_nothing(heads):
    AuxiliaryHeads.from_pretrained(heads, base_model=resized(VOCABULARY + 3, VOCABULARY))


def rewritten(rows: int):
    """A model with new rows where the fingerprint looks."""
    model = tiny_model("llama")
    looked_at = torch.linspace(0, VOCABULARY - 1, 16).long()[:rows]
    with torch.no_grad():
        model.lm_head.weight[looked_at] = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("rows", [1, 4])
def test_a_few_rewritten_rows_are_noted(rows, heads):
    with pytest.warns(UserWarning, match=f"{16 - rows} of 16 compared rows.*the others were rewritten"):
        AuxiliaryHeads.from_pretrained(heads, base_model=rewritten(rows))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: rewritten(5), "unembedding_fingerprint: .*11 of 16 compared rows"),
        (
            lambda: resized(VOCABULARY // 6),
            r"vocab_size: got 16 .* expected at least a quarter .* only 3 of the 16 rows",
        ),
        (lambda: tiny_model("llama", seed=1, vocab_size=120), "unembedding_fingerprint: .*0 of 16 compared rows"),
        (lambda: tiny_model("llama", seed=1, vocab_size=40), "unembedding_fingerprint: .*0 of 7 compared rows"),
    ],
    ids=["five rewritten", "few left", "other and larger", "other and smaller"],
)
def test_another_model_is_refused_whatever_its_vocabulary(model, message, heads):
    with pytest.raises(ValueError, match=message):
        AuxiliaryHeads.from_pretrained(heads, base_model=model())


def test_heads_that_were_loaded_behind_a_resized_vocabulary_fit_both_models_when_saved(heads, tmp_path):
    with pytest.warns(UserWarning, match="vocab_size"):
        AuxiliaryHeads.from_pretrained(heads, base_model=resized(VOCABULARY + 3)).save_pretrained(tmp_path)
    AuxiliaryHeads.from_pretrained(tmp_path, base_model=tiny_model("llama"))
    with pytest.warns(UserWarning, match="vocab_size"):
        AuxiliaryHeads.from_pretrained(tmp_path, base_model=resized(VOCABULARY + 3))


def test_the_repository_of_the_same_base_is_told_by_most_rows():
    def config(model):
        return AuxiliaryHeads.from_base_model(model, 2).config

    assert _difference_of_bases(config(tiny_model("llama")), config(rewritten(2))) is None
    assert _difference_of_bases(config(tiny_model("llama")), config(rewritten(5))) == "another unembedding"
    assert "vocab_size" in _difference_of_bases(config(tiny_model("llama")), config(resized(VOCABULARY + 3)))


def test_the_fingerprint_does_not_depend_on_the_programs_default_dtype():
    weight = torch.randn(300_001, 4)
    expected = fingerprint(weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fingerprint(weight) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unembedding_fingerprint", ["a"] * 16),
        ("unembedding_fingerprint", None),
        ("training", []),
        ("final_norm", "no"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(field, value, heads, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((heads / "config.json").read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"{field}: got"):
        HeadsConfig.from_file(path)


def test_sft_trainer_may_add_the_tokens_of_a_chat_template(tmp_path):
    """TRL resizes the model inside the trainer (clone_chat_template), before it makes the adapter."""
    base = save_checkpoint(tmp_path / "base")
    AuxiliaryHeads.from_base_model(tiny_llama(), 2).save_pretrained(tmp_path / "heads")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = tiny_tokenizer()
    own.pad_token = own.eos_token
    chat = [{"role": "user", "content": "ethanol"}, {"role": "assistant", "content": "propane"}]
    args = SFTConfig(
        str(tmp_path / "run"), chat_template_path=str(tmp_path / "tokenizer"), max_steps=1, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    config = CAFTConfig(
        heads=str(tmp_path / "heads"), num_auxiliary_heads=2, target_modules=["q_proj"], aux_loss_schedule="constant"
    )
    data = Dataset.from_list([{"messages": chat}] * 2)
    with pytest.warns(UserWarning, match="vocab_size: got 320 in the base model, 300 in the heads"):
        trainer = SFTTrainer(base, args, train_dataset=data, processing_class=own, peft_config=config)
    trainer.train()
    assert trainer.model.base_model.read_metrics()["loss_head_2"] > 0
