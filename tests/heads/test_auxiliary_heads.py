"""What an auxiliary head computes, and what it must not see, hold or draw."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.backbone import Backbone
from peft_caft.training.head_training import HeadPretraining

from ..support.tiny_models import PECULIAR, VOCABULARY, WITH_ATTENTION, tiny_model, tokens

HEAD_TYPES = ("residual", "decoder_layer")


def randomised(heads: AuxiliaryHeads) -> AuxiliaryHeads:
    generator = torch.Generator().manual_seed(5)
    for parameter in heads.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return heads


@pytest.mark.parametrize(("architecture", "attention"), WITH_ATTENTION)
def test_untrained_decoder_layer_head_reproduces_the_base_models_logits(architecture, attention):
    model = tiny_model(architecture, attention=attention)
    heads = AuxiliaryHeads.from_base_model(model, head_type="decoder_layer")
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    for logits in heads.logits(model, tokens()):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", PECULIAR)
def test_norm_and_logit_scale_are_found_in_peculiar_architectures(architecture):
    model = tiny_model(architecture)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    logits = AuxiliaryHeads.from_base_model(model, 1, "decoder_layer").logits(model, tokens())[0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_untrained_residual_head_is_the_identity():
    model = tiny_model("llama")
    heads = AuxiliaryHeads.from_base_model(model, head_type="residual", head_input="last_hidden_state")
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    torch.testing.assert_close(heads.logits(model, tokens())[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_input", ["last_layer_input", "last_hidden_state"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize(("architecture", "attention"), WITH_ATTENTION)
def test_no_future_leak(architecture, head_type, head_input, attention):
    model = tiny_model(architecture, attention=attention)
    heads = randomised(AuxiliaryHeads.from_base_model(model, 2, head_type, head_input, head_num_layers=2))
    changed = tokens().clone()
    changed[:, 8:] = tokens(seed=1)[:, 8:]
    for before, after in zip(heads.logits(model, tokens()), heads.logits(model, changed), strict=True):
        torch.testing.assert_close(after[:, :8], before[:, :8], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[:, 8:], before[:, 8:], atol=1e-2)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_head_k_predicts_token_t_plus_k(head_type):
    period = torch.tensor([7, 21, 3, 50, 14, 33, 90])
    sequence = period.repeat(6)[None, :40]
    model = tiny_model("llama")
    heads = AuxiliaryHeads.from_base_model(model, 4, head_type)
    pretraining = HeadPretraining(model, heads, aux_loss_decay=1.0).train()
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        pretraining(input_ids=sequence, labels=sequence)["loss"].backward()
        optimizer.step()
    for k, logits in enumerate(heads.eval().logits(model, sequence), start=2):
        predicted = logits[0].argmax(dim=-1)
        assert (predicted[:-k] == sequence[0, k:]).float().mean() > 0.8
        assert (predicted[: -k + 1] == sequence[0, k - 1 :]).float().mean() < 0.1


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_heads_hold_no_parameter_of_the_base_model(head_type):
    model = tiny_model("gpt2")
    heads = AuxiliaryHeads.from_base_model(model, head_type=head_type)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in heads.parameters()}
    shapes = {tuple(p.shape) for p in heads.state_dict().values()}
    assert not any(VOCABULARY in shape for shape in shapes)
    assert Backbone.of(model).final_norm is not None
    keys = model.state_dict().keys()
    assert keys == tiny_model("gpt2").state_dict().keys()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_making_saving_and_loading_heads_draws_no_random_number(head_type, tmp_path):
    model = tiny_model("llama")
    state = torch.get_rng_state()
    AuxiliaryHeads.from_base_model(model, head_type=head_type).save_pretrained(tmp_path)
    AuxiliaryHeads.from_pretrained(tmp_path, base_model=model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_logits_of_a_peft_model_see_its_adapter(head_type):
    heads = AuxiliaryHeads.from_base_model(tiny_model("llama"), head_type=head_type)
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], init_lora_weights=False)
    )
    with_adapter = heads.logits(adapted, tokens())[0]
    with adapted.disable_adapter():
        without = heads.logits(adapted, tokens())[0]
    torch.testing.assert_close(without, heads.logits(tiny_model("llama"), tokens())[0])
    assert not torch.allclose(with_adapter, without, atol=1e-2)


def test_changed_attention_implementation_reaches_the_heads():
    model = tiny_model("llama", attention="sdpa")
    heads = randomised(AuxiliaryHeads.from_base_model(model, head_type="decoder_layer"))
    expected = heads.logits(model, tokens())
    model.set_attn_implementation("eager")
    for got, wanted in zip(heads.logits(model, tokens()), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_heads_have_no_dropout_in_training():
    heads = AuxiliaryHeads.from_base_model(tiny_model("gpt2"), head_type="decoder_layer")
    heads.requires_grad_(False).train()
    assert not any(module.training for module in heads.modules())
    heads.requires_grad_(True).train()
    assert all(module.training for module in heads.modules())


@pytest.mark.parametrize("train_heads", ["frozen", "full"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
def test_training_registers_no_head_in_the_base_and_no_base_in_the_heads(head_type, train_heads):
    config = CAFTConfig(head_type=head_type, train_heads=train_heads, aux_loss_schedule="constant")
    model = get_peft_model(tiny_model("llama"), config).train()
    base, heads = model.get_base_model(), model.auxiliary_heads["default"]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert not {id(m) for m in base.modules()} & {id(m) for m in heads.modules()}
    assert not {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in heads.parameters()}
    assert not any("auxiliary" in key for key in base.state_dict())
    assert all(key.startswith("heads.") for key in heads.state_dict())
    hooked = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


class Int8Linear(nn.Module):
    """What a quantised layer looks like: its weight is no floating-point tensor."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.weight * 20).to(torch.int8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight.to(states.dtype) / 20)


def quantised() -> nn.Module:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    return model


def test_residual_heads_of_a_quantised_model_follow_the_reference():
    model = quantised()
    heads = AuxiliaryHeads.from_base_model(model, head_type="residual", head_input="last_hidden_state")
    with torch.no_grad():
        torch.testing.assert_close(heads.logits(model, tokens())[0], model(input_ids=tokens()).logits)


def test_decoder_layer_heads_of_a_quantised_model_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"int8.*residual"):
        AuxiliaryHeads.from_base_model(quantised(), head_type="decoder_layer")


def test_heads_of_another_model_are_refused_when_asked_for_logits():
    heads = AuxiliaryHeads.from_base_model(tiny_model("llama", seed=0))
    with pytest.raises(ValueError, match="unembedding_fingerprint"):
        heads.logits(tiny_model("llama", seed=1), tokens())
