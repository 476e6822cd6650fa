"""A decoder layer for supervised positions alone against the same layer for all positions."""

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.backbone import Backbone
from peft_caft.heads.layer_replay import LayerAtRows, Selection, replay

from ..support import architectures
from ..support.tiny_models import ARCHITECTURES, VOCABULARY, WITH_ATTENTION, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")


def layer_and_captured(model, **inputs):
    """A layer other than the model's last one, but of its kind, and what the last one was called with."""
    heads, backbone = AuxiliaryHeads.from_base_model(model, 1), Backbone.of(model)
    torch.manual_seed(5)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with backbone.capture() as records, torch.no_grad():
        backbone.trunk(use_cache=False, **inputs)
    return heads.heads[0][0], records[-1]


def assert_equals_replay(model, rows, **inputs):
    layer, captured = layer_and_captured(model, **inputs)
    results = []
    for compute in (
        lambda hidden: LayerAtRows()(layer, hidden, rows, captured),
        lambda hidden: replay(layer, hidden, captured).flatten(0, 1)[rows],
    ):
        hidden = captured.last_layer_input.clone().requires_grad_()
        output = compute(hidden)
        assert output is not None, "ran for all positions"
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        parameters = [p for p in layer.parameters() if p.dim() == 2 and p.requires_grad]
        results.append(
            [output, *torch.autograd.grad((weights * output).sum(), [hidden, *parameters], allow_unused=True)]
        )
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


EVERY_THIRD = torch.arange(0, 28, 3)


@pytest.mark.parametrize(("architecture", "attention"), WITH_ATTENTION)
def test_output_and_gradients_equal_those_of_all_positions(architecture, attention):
    assert_equals_replay(tiny_model(architecture, attention=attention), EVERY_THIRD, input_ids=tokens())


@pytest.mark.parametrize("rows", [[0], [13], [27], [0, 13, 14, 27], [14, 15, 16], list(range(7, 14))])
def test_any_choice_of_positions_will_do(rows):
    assert_equals_replay(tiny_model("llama", attention="sdpa"), torch.tensor(rows), input_ids=tokens())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("architecture", "attention"), WITH_ATTENTION)
def test_padding_is_no_context(architecture, attention, side):
    attention_mask = torch.ones_like(tokens())
    attention_mask[1, slice(9, None) if side == "right" else slice(None, 5)] = 0
    rows = attention_mask.flatten().nonzero()[::3, 0]
    model = tiny_model(architecture, attention=attention)
    assert_equals_replay(model, rows, input_ids=tokens(), attention_mask=attention_mask)


@pytest.mark.parametrize(("architecture", "attention"), WITH_ATTENTION)
def test_packed_documents_stay_apart(architecture, attention):
    position_ids = torch.cat([torch.arange(length) for length in (5, 2, 7)])[None]
    model = tiny_model(architecture, attention=attention)
    assert_equals_replay(model, torch.arange(1, 14, 2), input_ids=tokens(1), position_ids=position_ids)


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS", "DeepSeek-V3"])
def test_mixtures_and_latent_attention_need_no_code_of_their_own(name):
    assert_equals_replay(architectures.make(name), EVERY_THIRD, input_ids=tokens())


def test_layer_with_arguments_of_unknown_meaning_runs_for_all_positions():
    """BLOOM's layers get a bias of positions, whose shape says nothing of a query."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    layer, captured = layer_and_captured(AutoModelForCausalLM.from_config(config).eval(), input_ids=tokens())
    assert LayerAtRows()(layer, captured.last_layer_input, EVERY_THIRD, captured) is None


def test_layer_that_answers_otherwise_is_found_out_and_runs_for_all_positions(caplog):
    layer, captured = layer_and_captured(tiny_model("llama"), input_ids=tokens())
    layer.register_forward_hook(
        lambda module, args, output: output + output.shape[1]
    )  # knows how many positions there are
    at_rows = LayerAtRows()
    with caplog.at_level(logging.INFO, logger="peft_caft"):
        assert at_rows(layer, captured.last_layer_input, EVERY_THIRD, captured) is None
    assert at_rows.works is False
    assert "LlamaDecoderLayer runs for all positions" in caplog.text


def test_nearly_all_positions_are_computed_as_all():
    layer, captured = layer_and_captured(tiny_model("llama"), input_ids=tokens())
    assert LayerAtRows()(layer, captured.last_layer_input, torch.arange(27), captured) is None


def test_selection_is_a_rectangle_that_finds_every_position_again():
    rows = torch.tensor([1, 3, 10, 12, 13, 14])  # of three sequences of five tokens: 2, none, 4
    selection = Selection(rows, 3, 5)
    assert selection.index.tolist() == [[1, 3, 0, 0], [0, 0, 0, 0], [0, 2, 3, 4]]
    positions = torch.arange(15).view(3, 5)
    assert selection.of(positions).flatten()[selection.slots].tolist() == rows.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supervised_positions_alone_run_through_the_heads_in_training(architecture):
    """That the fast path is taken: the feed-forward part of a head sees the supervised positions and no others."""
    config = CAFTConfig(aux_loss_schedule="constant", target_modules="all-linear", num_auxiliary_heads=1)
    model = get_peft_model(tiny_model(architecture), config).train()
    labels = tokens().clone()
    labels[:, :10] = -100  # of 14
    seen = []
    mlp = model.auxiliary_heads["default"].heads[0][0].mlp
    for _ in range(2):  # the first forward also compares with the replay
        seen.clear()
        hook = mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        model(input_ids=tokens(), labels=labels).loss.backward()
        hook.remove()
    assert seen == [4]
