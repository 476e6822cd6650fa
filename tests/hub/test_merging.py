"""`merge`: which tokenizer and how many embeddings the merged model gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_caft.hub.inspection import inspect
from peft_caft.hub.merging import merge

from ..support.tiny_checkpoint import save_checkpoint, tiny_tokenizer

NEW = 300  # the first token that is added


def trained(base: str, rows: int, **lora) -> torch.nn.Module:
    """An adapter whose base was resized to ``rows``, with random values wherever it trains."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(rows, mean_resizing=False)
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | lora)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


@pytest.mark.parametrize(
    ("rows", "lora"),
    [
        (301, {"trainable_token_indices": [NEW]}),
        pytest.param(301, {}, marks=pytest.mark.slow),
        pytest.param(301, {"modules_to_save": ["embed_tokens", "lm_head"]}, marks=pytest.mark.slow),
        (301, {"target_modules": ["q_proj", "embed_tokens"]}),
        pytest.param(301, {"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.slow),
        (320, {}),  # padded to a multiple of 64
        (300, {"target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_merged_model_has_the_embeddings_that_the_adapter_was_trained_with(rows, lora, base, tmp_path):
    model, tokenizer = trained(base, rows, **lora), tiny_tokenizer()
    if rows > 300:
        tokenizer.add_tokens(["<new>"])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert merged.get_input_embeddings().num_embeddings == merged.config.vocab_size == rows
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    # Beside LoRA on one of embedding and lm_head PEFT (0.21) does not save the other one's new rows.
    is_whole = rows > 300 and "target_modules" not in lora
    ids = torch.tensor([[5, 6, 7, NEW if is_whole else 8, 9]])
    with torch.no_grad():
        got, expected = (m(ids).logits[..., : None if is_whole else 300] for m in (merged, model))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert inspect(str(tmp_path / "adapter"), base).misfit is None


def test_tokenizer_beside_the_adapter_goes_before_the_base_models(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = "MINE " + tokenizer.chat_template, "<s>"
    trained(base, 300).save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "without"))
    assert AutoTokenizer.from_pretrained(tmp_path / "without").pad_token is None
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "with"))
    got = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert (got.chat_template, got.pad_token) == (tokenizer.chat_template, "<s>")


def test_adapter_with_added_tokens_and_no_tokenizer_says_what_to_save(base, tmp_path):
    model = trained(base, 301, trainable_token_indices=[NEW])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"adapter: .*with 300 embeddings.*tokenizer\.save_pretrained") as error:
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert base in str(error.value)
    assert not (tmp_path / "merged").exists()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight
    assert torch.equal(merged[NEW], model.get_input_embeddings()(torch.tensor(NEW)))


def test_tokens_that_nobody_trained_are_named(base, tmp_path):
    trained(base, 300).save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    for name in ("one", "two"):
        with pytest.warns(UserWarning, match=r"holds no embedding.* of <a>, <b>, 2 token\(s\) that were added"):
            merge(str(tmp_path / "adapter"), str(tmp_path / name))
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in ("one", "two"))
    assert torch.equal(one, two)
    assert one.shape[0] == 302


def test_more_tokens_of_the_base_models_own_tokenizer_need_no_embedding(tmp_path):
    """Gemma 3's tokenizer names images beside models without them."""
    base, tokenizer = save_checkpoint(tmp_path / "base"), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(base)
    trained(base, 300).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 300


def test_base_model_that_is_an_adapter_is_refused(base, tmp_path):
    trained(base, 300).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"model: got .*adapter', an adapter, expected a whole model.*peft-caft merge"
    ):
        merge(adapter, str(tmp_path / "merged"), model=adapter)


def test_adapter_of_another_base_model_is_refused(base, tmp_path):
    trained(base, 300).save_pretrained(tmp_path / "adapter")
    other = save_checkpoint(tmp_path / "other", hidden_size=16)
    with pytest.raises(
        ValueError, match=r"^adapter: .*if it is another one than the adapter was trained on, name that"
    ):
        merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), model=other)
    assert not Path(tmp_path / "merged").exists()
