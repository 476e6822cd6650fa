"""What PEFT promises of a LoRA model holds for a CAFT model too.

Every test compares with plain LoRA or with the base model, on tiny random models, on the CPU and offline.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import peft_caft
from peft_caft import AuxiliaryHeads, CAFTConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Ten times the usual: outputs far from uniform, so that a changed weight shows.
    "initializer_range": 0.2,
}
MOE_SIZES = {**SIZES, "num_experts_per_tok": 2, "output_router_logits": False}


def seeded(config) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def llama(**changes) -> PreTrainedModel:
    return seeded(LlamaConfig(**{**SIZES, **changes}))


def gpt2() -> PreTrainedModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return seeded(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            **dropout,
            **special,
        )
    )


def qwen3_moe() -> PreTrainedModel:
    return seeded(Qwen3MoeConfig(**MOE_SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16))


def mixtral() -> PreTrainedModel:
    return seeded(MixtralConfig(**MOE_SIZES, num_local_experts=4))


def lora_config(**fields) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **fields})


def caft_config(**fields) -> CAFTConfig:
    """Strong auxiliary loss, so that its absence or a wrong gradient shows."""
    caft = {"num_auxiliary_heads": 2, "aux_loss_weight": 1.0, "aux_loss_schedule": "constant"}
    return CAFTConfig(**{"r": 4, "lora_alpha": 8, **caft, **fields})


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two sequences of nine tokens, the second padded on the right by two; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    input_ids[1, -2:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def inputs() -> dict[str, Tensor]:
    return {name: value for name, value in batch().items() if name != "labels"}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    return model(**inputs()).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one training forward and backward, of every parameter that got one."""
    model.train()
    model.zero_grad()
    loss = model(**batch()).loss
    assert torch.isfinite(loss)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    return losses


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "auxiliary_heads" not in name}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def seeded_peft(make_base: Callable[[], PreTrainedModel], config: LoraConfig, **kwargs) -> PeftModel:
    """A PEFT model whose adapter starts from the same random numbers whatever its method."""
    torch.manual_seed(1)
    return get_peft_model(make_base(), config, **kwargs)


def pair(make_base: Callable[[], PreTrainedModel], fields: dict, caft: dict | None = None):
    """The same adapter by CAFT and by plain LoRA."""
    return (
        seeded_peft(make_base, caft_config(**fields, **(caft or {}))),
        seeded_peft(make_base, lora_config(**fields)),
    )


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def saved_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {
            name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in sorted(file.keys())
        }


def pretrained_heads(folder: Path, base: PreTrainedModel, head_type: str = "decoder_layer") -> AuxiliaryHeads:
    """Saved heads whose weights differ from fresh ones."""
    heads = AuxiliaryHeads.from_base_model(base, 2, head_type)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    heads.save_pretrained(folder)
    return heads


QV = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FEATURES = {
    "plain": (llama, QV),
    "plain-gpt2": (gpt2, {}),
    "default-targets": (llama, {}),
    "dropout": (llama, {**QV, "lora_dropout": 0.1}),
    "dora": (llama, {**QV, "use_dora": True}),
    "rslora": (llama, {**QV, "use_rslora": True}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "all-linear-gpt2": (gpt2, {"target_modules": "all-linear"}),
    "rank-and-alpha-pattern": (
        llama,
        {**QV, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    ),
    "modules-to-save-embeddings": (llama, {**QV, "modules_to_save": ["embed_tokens"]}),
    "modules-to-save-norm": (llama, {**QV, "modules_to_save": ["norm"]}),
    "trainable-tokens": (llama, {**QV, "trainable_token_indices": [3, 5, 9, 11]}),
    "embeddings-targeted": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "layers-to-transform": (llama, {**QV, "layers_to_transform": [0], "layers_pattern": "layers"}),
    "exclude-modules": (llama, {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    "target-parameters-qwen3-moe": (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "target-parameters-mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts-by-their-old-names": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "bias-all": (gpt2, {"bias": "all"}),
    "bias-lora-only": (lambda: llama(attention_bias=True), {**QV, "bias": "lora_only"}),
    "lora-bias": (lambda: llama(attention_bias=True), {**QV, "lora_bias": True}),
    "tied-embeddings": (lambda: llama(tie_word_embeddings=True), QV),
    "gaussian-init": (llama, {**QV, "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize(("make_base", "fields"), FEATURES.values(), ids=FEATURES.keys())
def test_lora_feature_trains_saves_reloads_and_merges_as_in_lora(make_base, fields, tmp_path):
    caft, lora = pair(make_base, fields)
    assert_trains_the_parameters_that_lora_trains(caft, lora)
    lora.load_state_dict(without_heads(caft.state_dict()))
    assert_is_saved_as_lora_saves_it_and_reloads(caft, lora, make_base, tmp_path)
    assert_merges_to_the_adapted_base(caft, lora, make_base())


def assert_trains_the_parameters_that_lora_trains(caft: PeftModel, lora: PeftModel) -> None:
    assert trainable(caft) == trainable(lora)
    assert_same_tensors(without_heads(caft.state_dict()), lora.state_dict())
    expected, got = gradients(lora), gradients(caft)
    assert got.keys() == expected.keys()
    # Early layers learn from the auxiliary loss too; where LoRA has a gradient (not in A beside B = 0), CAFT's differs.
    changed = [
        name for name, gradient in expected.items() if (got[name] - gradient).norm() > 0.01 * gradient.norm() > 0
    ]
    assert any("layers.0." in name or ".h.0." in name for name in changed)
    assert all(gradient.isfinite().all() for gradient in got.values())
    before = {name: p.detach().clone() for name, p in caft.named_parameters()}
    train(caft)
    assert {name for name, p in caft.named_parameters() if not torch.equal(p, before[name])} == trainable(lora)


def assert_is_saved_as_lora_saves_it_and_reloads(caft: PeftModel, lora: PeftModel, make_base, folder: Path) -> None:
    """``lora`` has the weights of ``caft``."""
    expected = logits(caft)
    caft.save_pretrained(folder / "caft")
    lora.save_pretrained(folder / "lora")
    assert_same_tensors(
        load_file(folder / "caft" / "adapter_model.safetensors"),
        load_file(folder / "lora" / "adapter_model.safetensors"),
    )
    assert saved_tensors(folder / "caft") == saved_tensors(folder / "lora")
    config = json.loads((folder / "caft" / "adapter_config.json").read_text())
    assert config == json.loads((folder / "lora" / "adapter_config.json").read_text())
    with no_warnings():
        plain = PeftModel.from_pretrained(make_base(), folder / "caft")
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain), expected, atol=1e-6, rtol=1e-6)
    resumed = peft_caft.load_adapter(make_base(), folder / "caft")
    torch.testing.assert_close(logits(resumed), expected, atol=1e-6, rtol=1e-6)
    assert trainable(resumed) == trainable(lora)


def assert_merges_to_the_adapted_base(caft: PeftModel, lora: PeftModel, base: PreTrainedModel) -> None:
    expected = logits(caft)
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    merged = caft.merge_and_unload()
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == lora.merge_and_unload().state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_trained_lm_head_gets_no_auxiliary_gradient_and_a_warning(tmp_path):
    fields = {**QV, "modules_to_save": ["lm_head"]}
    with pytest.warns(UserWarning, match="lm_head: an adapter changes it .* no auxiliary gradient reaches the change"):
        caft = seeded_peft(llama, caft_config(**fields))
    lora = seeded_peft(llama, lora_config(**fields))
    assert trainable(caft) == trainable(lora)
    expected, got = gradients(lora), gradients(caft)
    lm_head = "base_model.model.lm_head.modules_to_save.default.weight"
    torch.testing.assert_close(got[lm_head], expected[lm_head])
    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert not torch.allclose(got[query], expected[query])
    train(caft)
    expected_logits = logits(caft)
    caft.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected_logits)
    merged = caft.merge_and_unload()
    assert merged.state_dict().keys() == llama().state_dict().keys()
    torch.testing.assert_close(logits(merged), expected_logits, atol=1e-4, rtol=1e-4)


def test_pissa_adapter_is_converted_to_lora_when_saved(tmp_path):
    fields = {**QV, "init_lora_weights": "pissa"}
    for name, model in zip(("caft", "lora"), pair(llama, fields), strict=True):
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / name / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        expected = logits(model)
        initial = str(tmp_path / name / "initial")
        model.save_pretrained(tmp_path / name / "final", path_initial_model_for_weight_conversion=initial)
        plain = PeftModel.from_pretrained(llama(), tmp_path / name / "final")
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    assert saved_tensors(tmp_path / "caft" / "final") == saved_tensors(tmp_path / "lora" / "final")


# Losses and random numbers.


@pytest.mark.parametrize("make_base", [llama, gpt2])
@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
def test_training_with_beta_zero_is_bit_identical_to_lora(make_base, train_heads):
    caft, lora = pair(make_base, {"lora_dropout": 0.2}, {"aux_loss_weight": 0.0, "train_heads": train_heads})
    initial = copy.deepcopy(lora.state_dict())
    torch.manual_seed(2)
    caft_losses = train(caft)
    torch.manual_seed(2)
    assert train(lora) == caft_losses
    assert_same_tensors(without_heads(caft.state_dict()), lora.state_dict())
    assert any(not torch.equal(value, initial[name]) for name, value in lora.state_dict().items())


def test_auxiliary_loss_draws_no_random_number():
    caft, lora = pair(llama, {**QV, "lora_dropout": 0.2}, {"aux_token_fraction": 0.5})
    after = []
    for model in (caft, lora):
        torch.manual_seed(3)
        model.train()
        model(**batch()).loss.backward()
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_making_heads_draws_no_random_number(head_type, train_heads):
    after = []
    for config in (caft_config(**QV, head_type=head_type, train_heads=train_heads), lora_config(**QV)):
        seeded_peft(llama, config)
        after.append(torch.rand(4))
    assert torch.equal(*after)


def test_evaluation_loss_is_loras():
    caft, lora = pair(llama, QV)
    state = {name: value for name, value in caft.state_dict().items() if "auxiliary_heads" not in name}
    train(caft)
    lora.load_state_dict(state)
    expected = lora.eval()(**batch()).loss
    assert torch.equal(caft.eval()(**batch()).loss, expected)
    with torch.no_grad():
        assert torch.equal(caft.train()(**batch()).loss, expected)
    assert caft.train()(**batch()).loss > expected + 0.1


def test_disabled_adapter_gives_the_base_models_loss_without_auxiliary_loss():
    base_loss = llama()(**batch()).loss
    caft, _ = pair(llama, QV, {"train_heads": "full"})
    train(caft)
    caft.train()
    with caft.disable_adapter():
        loss = caft(**batch()).loss
        assert not trainable(caft)
    assert torch.equal(loss, base_loss)
    assert caft(**batch()).loss > caft.eval()(**batch()).loss + 0.1
    assert any("auxiliary_heads" in name for name in trainable(caft))


@pytest.mark.parametrize("make_base", [llama, gpt2])
def test_generation_with_cache_is_loras(make_base):
    caft, lora = pair(make_base, {})
    train(caft)
    lora.load_state_dict(without_heads(caft.state_dict()))
    prompt = {"input_ids": inputs()["input_ids"][:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    arguments = {**prompt, "max_new_tokens": 12, "do_sample": False}
    expected = lora.eval().generate(**arguments, use_cache=True)
    assert torch.equal(caft.eval().generate(**arguments, use_cache=True), expected)
    assert torch.equal(caft.train().eval().generate(**arguments, use_cache=False), expected)
    assert not torch.equal(expected, make_base().eval().generate(**arguments))


def checkpointed(make_base: Callable[[], PreTrainedModel], use_reentrant: bool) -> PreTrainedModel:
    base = make_base()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return base


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize("train_heads", ["frozen", "full"])
@pytest.mark.parametrize("make_base", [llama, gpt2])
def test_gradient_checkpointing_changes_no_gradient(make_base, train_heads, head_type):
    config = {"head_type": head_type, "train_heads": train_heads, "target_modules": "all-linear"}
    expected = gradients(seeded_peft(make_base, caft_config(**config)))
    for use_reentrant in (True, False):
        model = seeded_peft(partial(checkpointed, make_base, use_reentrant), caft_config(**config))
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        got = gradients(model)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (name, use_reentrant)


# Number formats.


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_bf16_autocast_follows_fp32(head_type, train_heads):
    config = {**QV, "head_type": head_type, "train_heads": train_heads}
    expected = gradients(seeded_peft(llama, caft_config(**config)))
    model = seeded_peft(llama, caft_config(**config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_bf16_model_trains_with_fp32_adapter_and_heads(head_type, train_heads):
    config = caft_config(target_modules="all-linear", head_type=head_type, train_heads=train_heads)
    model = seeded_peft(lambda: llama().bfloat16(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(before[name].dtype == torch.float32 for name in trainable(model))
    assert all(p.dtype == torch.bfloat16 for name, p in before.items() if name not in trainable(model))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(5):
        losses.append(model(**batch()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable(model)
    expected = {"frozen": 0, "lora": 1, "full": 1}[train_heads]
    assert any("auxiliary_heads" in name for name in changed) == expected


# Operations on adapters.


def heads_of(model: PeftModel, adapter: str) -> AuxiliaryHeads:
    return model.base_model.auxiliary_heads[adapter]


@pytest.mark.parametrize(
    ("make_base", "fields"),
    [
        FEATURES[name]
        for name in ("all-linear", "dora", "modules-to-save-norm", "target-parameters-qwen3-moe", "all-linear-gpt2")
    ],
)
def test_second_adapter_gets_fresh_heads_from_beneath_the_first(make_base, fields):
    model = seeded_peft(make_base, caft_config(**fields))
    train(model)
    first = without_heads(model.state_dict())
    model.add_adapter("second", caft_config(**fields, num_auxiliary_heads=3))
    assert len(heads_of(model, "second").heads) == 3
    fresh = AuxiliaryHeads.from_base_model(make_base(), 3)
    assert_same_tensors(heads_of(model, "second").state_dict(), fresh.state_dict())
    assert not any(isinstance(module, BaseTunerLayer) for module in heads_of(model, "second").modules())
    # The copies are no views of the base model, nor of one another.
    own = {p.data_ptr() for p in heads_of(model, "second").parameters()}
    assert not own & {p.data_ptr() for p in model.get_base_model().parameters()}
    assert len(own) == len(list(heads_of(model, "second").parameters()))
    model.set_adapter("second")
    train(model)
    for name, value in first.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_set_adapter_switches_heads_and_schedule():
    model = seeded_peft(llama, caft_config(**QV, train_heads="full"))
    model.add_adapter("second", caft_config(**QV, train_heads="lora", aux_loss_schedule="linear_decay", total_steps=4))
    assert all(p.requires_grad for p in heads_of(model, "default").parameters())
    assert not any(p.requires_grad for p in heads_of(model, "second").parameters())
    model.set_adapter("second")
    assert not any(p.requires_grad for p in heads_of(model, "default").parameters())
    assert {n for n, p in heads_of(model, "second").named_parameters() if p.requires_grad} == {
        n for n, _ in heads_of(model, "second").named_parameters() if "lora_" in n
    }
    before = {name: value.clone() for name, value in heads_of(model, "default").state_dict().items()}
    model.set_training_progress(1)
    train(model, steps=1)
    assert model.base_model.gamma.item() == pytest.approx(0.75)
    assert_same_tensors(heads_of(model, "default").state_dict(), before)
    model.set_adapter("default")
    train(model, steps=1)
    assert model.base_model.gamma.item() == 1.0


def test_deleted_adapter_takes_its_heads_along():
    model = seeded_peft(llama, caft_config(**QV))
    model.add_adapter("second", caft_config(**QV))
    expected = logits(model)
    model.set_adapter("second")
    model.delete_adapter("second")
    assert set(model.base_model.auxiliary_heads) == {"default"}
    assert not any("second" in name for name in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    train(model)


def test_adapter_that_follows_a_deleted_one_trains_its_heads():
    model = seeded_peft(llama, caft_config(**QV, train_heads="full"))
    expected = {name.replace("default", "second") for name in trainable(model)}
    model.add_adapter("second", caft_config(**QV, train_heads="full"))
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert trainable(model) == expected


def test_set_requires_grad_freezes_the_heads_with_their_adapter():
    model = seeded_peft(llama, caft_config(**QV, train_heads="full"))
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad("default")
    assert any("auxiliary_heads" in name for name in trainable(model))
    assert any("lora_A" in name for name in trainable(model))


def test_weighted_combination_of_adapters_is_loras():
    results = []
    for model, make in zip(pair(llama, QV), (caft_config, lora_config), strict=True):
        torch.manual_seed(2)
        model.add_adapter("second", make(**QV))
        with torch.no_grad():
            adapters = sorted((name, p) for name, p in model.named_parameters() if "lora_B" in name)
            for index, (_, parameter) in enumerate(adapters):
                parameter.fill_(0.01 * (index % 7))
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type="linear")
        model.set_adapter("mixed")
        results.append(logits(model))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], logits(llama()))


@pytest.mark.parametrize("train_heads", ["frozen", "lora"])
def test_merge_adapter_and_unmerge_adapter_leave_base_and_heads_as_they_were(train_heads):
    model = seeded_peft(llama, caft_config(target_modules="all-linear", train_heads=train_heads))
    train(model)
    expected = logits(model)
    heads = copy.deepcopy(heads_of(model, "default").state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert_same_tensors(heads_of(model, "default").state_dict(), heads)
    model.unmerge_adapter()
    base = llama().state_dict()
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(value, base[name.replace("base_layer.", "")], atol=1e-5, rtol=1e-5)
    train(model)


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
def test_unload_returns_the_untouched_base(train_heads):
    model = seeded_peft(llama, caft_config(**QV, train_heads=train_heads))
    train(model)
    base = model.unload()
    assert type(base) is type(llama())
    assert_same_tensors(base.state_dict(), llama().state_dict())
    assert not any("auxiliary" in name for name, _ in base.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_weights_load_into_the_existing_adapter(tmp_path):
    """As Trainer does for the best checkpoint and on resume."""
    model = seeded_peft(llama, caft_config(**QV, train_heads="lora"))
    train(model)
    model.save_pretrained(tmp_path)
    expected, heads = logits(model), copy.deepcopy(heads_of(model, "default").state_dict())
    train(model)
    heads_later = copy.deepcopy(heads_of(model, "default").state_dict())
    assert not torch.equal(logits(model), expected)
    with no_warnings():
        result = model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert torch.equal(logits(model), expected)
    assert any(not torch.equal(heads_later[name], value) for name, value in heads.items())
    assert_same_tensors(heads_of(model, "default").state_dict(), heads_later)
    train(model)


def test_load_adapter_adds_an_adapter_with_its_heads_to_a_caft_model(tmp_path):
    model = seeded_peft(llama, caft_config(**QV))
    train(model)
    model.save_pretrained(tmp_path)
    other = seeded_peft(llama, caft_config(**QV, num_auxiliary_heads=1))
    before = logits(other)
    peft_caft.load_adapter(other, tmp_path, "second")
    assert other.active_adapters == ["default"]
    assert torch.equal(logits(other), before)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    assert len(heads_of(other, "second").heads) == 2
    train(other)


def test_adapter_loaded_for_inference_has_no_heads_and_says_so_in_training(tmp_path):
    model = seeded_peft(llama, caft_config(**QV))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft_caft.load_adapter(llama(), tmp_path, is_trainable=False)
    assert not trainable(loaded)
    assert not list(loaded.base_model.auxiliary_heads)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="loaded for inference"):
        loaded.train()(**batch())


@pytest.mark.parametrize("train_heads", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_low_cpu_mem_usage_loads_real_adapter_and_heads(head_type, train_heads, tmp_path):
    heads = pretrained_heads(tmp_path / "heads", llama(), head_type)
    model = seeded_peft(llama, caft_config(**QV, heads=str(tmp_path / "heads"), train_heads=train_heads))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    config = CAFTConfig.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        llama(), tmp_path / "adapter", config=config, is_trainable=True, low_cpu_mem_usage=True
    )
    assert not [n for n, t in [*loaded.named_parameters(), *loaded.named_buffers()] if t.device.type != "cpu"]
    assert_same_tensors(heads_of(loaded, "default").plain_state_dict(), heads.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    assert trainable(loaded) == trainable(model)
    reference = PeftModel.from_pretrained(llama(), tmp_path / "adapter", config=config, is_trainable=True)
    assert train(loaded, steps=1) == train(reference, steps=1)


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}, {"modules_to_save": ["embed_tokens"]}])
def test_trainable_parameters_printed_are_loras(fields, capsys):
    caft, lora = pair(llama, fields)
    caft.print_trainable_parameters()
    lora.print_trainable_parameters()
    printed = [line.split("||")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == printed[1] != "trainable params: 0 "


@pytest.mark.parametrize("train_heads", ["frozen", "full"])
def test_deepcopy_is_independent(train_heads):
    model = seeded_peft(llama, caft_config(target_modules="all-linear", train_heads=train_heads))
    train(model)
    clone = copy.deepcopy(model)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in clone.parameters()}
    expected = gradients(model)
    got = gradients(clone)
    assert_same_tensors(got, expected)
    train(clone)
    assert_same_tensors(model.state_dict(), state)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(clone), before)


# Without the plugin.

LOAD_WITHOUT_THE_PLUGIN = """
import gc, sys, warnings

gc.disable()  # it would walk through what the imports make, again and again

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_caft":
            raise ImportError("peft_caft is blocked")

sys.meta_path.insert(0, Block())
try:
    import peft_caft
except ImportError:
    pass
else:
    sys.exit("peft_caft could be imported")

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, adapter, inputs, output = sys.argv[1:]
inputs = torch.load(inputs)
warnings.simplefilter("error", UserWarning)
through_transformers = AutoModelForCausalLM.from_pretrained(base)
through_transformers.load_adapter(adapter)
models = {
    "PeftModel": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": through_transformers,
}
with torch.no_grad():
    torch.save({name: model.eval()(**inputs).logits for name, model in models.items()}, output)
assert not any("peft_caft" in name for name in sys.modules)
"""


def test_adapter_loads_without_the_plugin(tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    torch.manual_seed(1)
    heads = str(tmp_path / "heads")
    pretrained_heads(tmp_path / "heads", AutoModelForCausalLM.from_pretrained(base))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        caft_config(target_modules="all-linear", heads=heads, train_heads="lora"),
    )
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(inputs(), tmp_path / "inputs.pt")
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PLUGIN, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "logits.pt")
    assert len(loaded) == 3
    for name, got in loaded.items():
        torch.testing.assert_close(got, logits(model), atol=1e-6, rtol=1e-6, msg=name)
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_auto_class_loads_a_caft_adapter_in_this_process(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), caft_config(**QV))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_adapter_folder_holds_no_head(tmp_path):
    model = seeded_peft(llama, caft_config(**QV, train_heads="full"))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "caft_config.json"}
    assert all("lora_" in name for name in saved_tensors(tmp_path))
    assert not set(json.loads((tmp_path / "adapter_config.json").read_text())) - set(
        LoraConfig().to_dict() | {"auto_mapping": None, "peft_version": None}
    )
