"""Heads made by the authors' own package (see authors_heads/make.py) become heads of this one, exactly and safely."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.basics.files import file_sha256
from peft_caft.heads.config import HeadsConfig
from peft_caft.hub.import_caft_llm import heads_of, import_heads, read_state_dict

from ..support.commands import peft_caft
from ..support.hub_client import ClientError
from ..support.places import ROOT
from ..support.rounding import LAYER_OPERATIONS, require_same_up_to_rounding

THEIRS = ROOT / "tests" / "support" / "authors_heads"
BASE = str(THEIRS / "base")
KINDS = {"residual": "residual", "decoder": "decoder_layer"}
STAGES = {"stage1": "last_layer_input", "stage2": "last_hidden_state"}
OPERATIONS = 4 * LAYER_OPERATIONS + 2  # the model's three layers and a head's, norm and unembedding


def base_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BASE).eval()


def state(kind: str = "residual") -> dict[str, torch.Tensor]:
    return read_state_dict(THEIRS / f"heads_{kind}.pth")


def expected(name: str) -> torch.Tensor:
    return load_file(THEIRS / "expected.safetensors")[name]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_imported_heads_predict_what_they_predict_in_the_authors_package(kind, stage, tmp_path):
    import_heads(str(THEIRS / f"heads_{kind}.pth"), BASE, str(tmp_path / "heads"), STAGES[stage])
    base = base_model()
    heads = AuxiliaryHeads.from_pretrained(tmp_path / "heads", base_model=base)
    own, *theirs = expected(f"{kind}.{stage}")
    ids = expected("input_ids")
    require_same_up_to_rounding(base(ids).logits, own, OPERATIONS)
    got = heads.logits(base, ids)
    assert len(got) == len(theirs) == 3
    for ours, wanted in zip(got, theirs, strict=True):
        require_same_up_to_rounding(ours, wanted, OPERATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_default_input_is_the_one_that_the_heads_were_trained_on(kind):
    """The authors' stage 1 trained these heads to count; fed as in their stage 2, they know much less, if anything."""
    base, losses = base_model(), {}
    assert heads_of(state(kind), base).config.head_input == "last_layer_input"
    ids = (torch.arange(32)[:, None] + torch.arange(16)) % 32
    for head_input in STAGES.values():
        logits = heads_of(state(kind), base, head_input).logits(base, ids)
        losses[head_input] = [
            nn.functional.cross_entropy(head[:, :-k].flatten(0, 1), ids[:, k:].flatten()).item()
            for k, head in enumerate(logits, start=2)
        ]
    for trained_on, fed_by_stage2 in zip(losses["last_layer_input"], losses["last_hidden_state"], strict=True):
        assert trained_on < fed_by_stage2 - 0.9


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("head_input", STAGES.values())
def test_input_and_norm_combine_freely(head_input, final_norm):
    base, ids = base_model(), expected("input_ids")
    heads = AuxiliaryHeads.from_base_model(base, 1, "residual", head_input)  # the identity
    heads.config.final_norm = final_norm
    hidden = base(ids, output_hidden_states=True).hidden_states[-2 if head_input == "last_layer_input" else -1]
    wanted = base.lm_head(base.model.norm(hidden) if final_norm else hidden)
    require_same_up_to_rounding(heads.logits(base, ids)[0], wanted, OPERATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_artifact_says_what_was_imported(kind, tmp_path):
    source = THEIRS / f"heads_{kind}.pth"
    output = peft_caft(
        "import-heads", str(source), "--model", BASE, "--output", str(tmp_path / "new" / "heads"),
        "--base-model-id", "org/tiny-llama", "--license", "llama3.1",
    )  # fmt: skip
    assert (
        f"3 {KINDS[kind]} heads of {2 if kind == 'residual' else 1} layer(s), which read the last_layer_input"
        in output
    )
    config = HeadsConfig.from_file(tmp_path / "new" / "heads" / "config.json")
    assert (config.head_type, config.num_heads, config.head_num_layers) == (
        KINDS[kind],
        3,
        2 if kind == "residual" else 1,
    )
    assert (config.head_input, config.final_norm) == ("last_layer_input", False)
    assert config.residual_bias == (kind == "residual")
    assert (config.base_model_name_or_path, config.license) == ("org/tiny-llama", "llama3.1")
    assert config.training["imported_from"] == "caft-llm"
    assert config.training["file"] == source.name
    assert config.training["file_sha256"] == file_sha256(source)
    assert config.training["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    card = (tmp_path / "new" / "heads" / "README.md").read_text()
    assert "not trained" not in card
    assert "imported from: caft-llm" in card
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["heads"]


def test_every_tensor_arrives_in_the_dtype_of_the_file(tmp_path):
    theirs = {key: tensor.bfloat16() for key, tensor in state("decoder").items()}
    torch.save(theirs, tmp_path / "heads.pth")
    assert (
        import_heads(str(tmp_path / "heads.pth"), BASE, str(tmp_path / "heads")).config.head_input
        == "last_layer_input"
    )
    written = load_file(tmp_path / "heads" / "model.safetensors")
    assert len(written) == len(theirs)
    for key, tensor in theirs.items():
        head, _, layer, rest = key.split(".", 3)
        torch.testing.assert_close(written[f"heads.{head}.{layer}.{rest}"], tensor, rtol=0, atol=0)


def test_old_torch_format_is_read_too(tmp_path):
    torch.save(state(), tmp_path / "heads.pth", _use_new_zipfile_serialization=False)
    read = read_state_dict(tmp_path / "heads.pth")
    assert all(torch.equal(read[key], tensor) for key, tensor in state().items())


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_imported_heads_train_an_adapter(kind, train_heads, tmp_path):
    import_heads(str(THEIRS / f"heads_{kind}.pth"), BASE, str(tmp_path / "heads"))
    config = CAFTConfig(
        heads=str(tmp_path / "heads"), num_auxiliary_heads=3, train_heads=train_heads, target_modules="all-linear",
        aux_loss_schedule="constant", aux_loss_weight=1.0, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(base_model(), config).train()
    ids = expected("input_ids")
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    with model.base_model.auxiliary_loss_enabled(False):
        plain = model(input_ids=ids, labels=ids).loss
    assert model(input_ids=ids, labels=ids).loss > plain + 1  # the heads' loss is in it


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_file_that_would_run_code_is_refused_and_runs_none(new_format, tmp_path):
    trap = tmp_path / "trap"
    torch.save(
        {"0.layers.0.linear.weight": RunsCode(trap)}, tmp_path / "h.pth", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(ValueError, match=r"refused, since reading it would run code: it holds \w+\.mkdir"):
        read_state_dict(tmp_path / "h.pth")
    assert not trap.exists()
    torch.save(nn.Linear(2, 2), tmp_path / "h.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"refused.*it holds torch.nn.modules.linear.Linear"):
        read_state_dict(tmp_path / "h.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, no heads here\n" * 9,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\x05\x06" + 18 * b"\0",
        None,
    ],
    ids=["empty", "text", "lfs_pointer", "empty_zip", "cut_off"],
)
def test_file_that_is_no_torch_file_is_an_error(content, tmp_path):
    whole = (THEIRS / "heads_residual.pth").read_bytes()
    (tmp_path / "h.pth").write_bytes(whole[: len(whole) // 2] if content is None else content)
    output = peft_caft(
        "import-heads", str(tmp_path / "h.pth"), "--model", BASE, "--output", str(tmp_path / "o"), expect=1
    )
    assert "h.pth: damaged, or not a file that torch.save wrote" in output
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "got an empty dict, expected a state dict"),
        (torch.zeros(2), "got a Tensor, expected a state dict"),
        ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
        (
            {"0.layers.0.linear.weight": torch.zeros(2, dtype=torch.int8)},
            "is torch.int8.*expected dense floating point",
        ),
        ({"0.layers.0.linear.weight": torch.eye(2).to_sparse()}, "torch.sparse_coo, expected dense floating point"),
        ({"0.layers.0.linear.weight": torch.tensor([1.0, float("nan")])}, "holds infinite values or NaN"),
    ],
)
def test_file_that_is_no_state_dict_is_an_error(value, message, tmp_path):
    torch.save(value, tmp_path / "h.pth")
    with pytest.raises(ValueError, match=rf"h\.pth: .*{message}"):
        read_state_dict(tmp_path / "h.pth")


def without(prefix: str, kind: str = "residual") -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state(kind).items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("make_state", "message"),
    [
        (lambda: without("1."), r"1\.layers\.0 is missing, expected 3 heads of 2 layer\(s\)"),
        (lambda: without("2.layers.1"), r"2\.layers\.1 is missing, expected 3 heads of 2 layer\(s\)"),
        (
            lambda: without("0.layers.0.linear.bias"),
            r"1 tensor\(s\).*'0.layers.0.linear.bias': got nothing, expected \(16,\)",
        ),
        (lambda: state() | {"medusa": torch.zeros(1)}, r"1 unknown name\(s\), first 'medusa', expected HEAD.layers"),
        (
            lambda: {f"auxiliary_head.{key}": tensor for key, tensor in state().items()},
            r"12 unknown name\(s\), first 'auxiliary_head.0.layers.0.linear.weight'",
        ),
        (
            lambda: state("decoder") | {"0.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
            r"'0.layers.0.self_attn.q_proj.bias': got \(16,\), expected nothing",
        ),
        (
            lambda: state() | {"0.lm_head.weight": torch.zeros(32, 16)},
            r"an unembedding of their own .*first '0.lm_head.weight'",
        ),
        (lambda: without("0.", "decoder") | without("1.") | without("2."), "do not fit"),
    ],
    ids=["gap", "fewer_layers", "no_bias", "unknown", "whole_model", "extra_bias", "unembedding", "both_types"],
)
def test_nothing_in_the_file_is_ignored_and_nothing_may_lack(make_state, message):
    with pytest.raises(ValueError, match=message):
        heads_of(make_state(), base_model())


def test_heads_with_lora_inside_are_refused():
    block = nn.ModuleDict({"linear": nn.Linear(16, 16)})
    heads = nn.ModuleList([nn.ModuleDict({"layers": nn.ModuleList([block])})])
    inject_adapter_in_model(LoraConfig(target_modules=["linear"]), heads)
    with pytest.raises(
        ValueError, match=r"holds LoRA layers, whose scale .*'0.layers.0.linear.lora_A.default.weight'"
    ):
        heads_of(heads.state_dict(), base_model())


@pytest.mark.parametrize("kind", KINDS)
def test_base_model_of_another_size_is_refused_with_both_sizes(kind):
    wide = LlamaForCausalLM(LlamaConfig(**{**base_model().config.to_dict(), "hidden_size": 32, "head_dim": None}))
    with pytest.raises(ValueError, match=r"whose hidden size is 32: .*first .*: got \(16.*, expected \(32"):
        heads_of(state(kind), wide)


def test_base_model_whose_layers_only_look_like_a_llamas_is_refused():
    """Residual heads are the same for every model, decoder-layer heads are Llama's layers."""
    from transformers import CohereConfig, CohereForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {name: getattr(base_model().config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    )}  # fmt: skip
    mistral = MistralForCausalLM(MistralConfig(**sizes, head_dim=4))
    assert {k: v.shape for k, v in mistral.model.layers[-1].state_dict().items()} == {
        k: v.shape for k, v in base_model().model.layers[-1].state_dict().items()
    }
    with pytest.raises(TypeError, match=r"whose layers are MistralDecoderLayer, expected a Llama"):
        heads_of(state("decoder"), mistral)
    assert len(heads_of(state("residual"), mistral).logits(mistral, expected("input_ids"))) == 3
    with pytest.raises(TypeError, match="got CohereForCausalLM, which scales or caps its logits"):
        heads_of(state("residual"), CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.3)))


def test_paths_that_hold_no_heads_or_other_things_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"heads: no file 'nowhere/heads\.pth'"):
        import_heads("nowhere/heads.pth", BASE, str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"got the folder .*expected a file such as .*heads\.pth"):
        import_heads(str(THEIRS), BASE, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="head_input"):
        import_heads(str(THEIRS / "heads_residual.pth"), BASE, str(tmp_path / "out"), "logits")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output: .*full exists, expected a new folder"):
        import_heads(str(THEIRS / "heads_residual.pth"), BASE, str(tmp_path / "full"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_heads_come_from_the_hub_at_one_commit(client, hub, tmp_path):
    client.run(
        "from huggingface_hub import HfApi\n"
        "from peft_caft.hub.import_caft_llm import import_heads\n"
        "api = HfApi(token='write-token')\n"
        "api.create_repo('org/aux-heads')\n"
        "api.upload_file(path_or_fileobj=file, path_in_repo='heads.pth', repo_id='org/aux-heads')",
        file=str(THEIRS / "heads_decoder.pth"),
    )
    code = "import_heads(source, base, out, revision=revision).config.training"
    arguments = {"base": BASE, "out": str(tmp_path / "heads"), "revision": None}
    training = client.run(code, source="org/aux-heads", **arguments)
    assert (training["repository"], training["revision"]) == ("org/aux-heads", hub.head("org/aux-heads"))
    with pytest.raises(ClientError, match=r"FileNotFoundError: heads: 'org/nothing' on .*no such repository"):
        client.run(code, source="org/nothing", **arguments | {"out": str(tmp_path / "other")})
