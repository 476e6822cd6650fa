"""Loss and gradients of CAFT against the naive reference in ``tests/reference.py``."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_caft import AuxiliaryHeads, CAFTConfig

from ..reference import all_logits, reference_loss
from ..support.tiny_models import ARCHITECTURES, CONFIGS, LLAMA_LIKE, VOCABULARY, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
BETA, ALPHA = 0.7, 0.8


def caft(architecture: str = "llama", seed: int = 0, **fields):
    """A CAFT model in training mode, with adapters and heads far from their trivial initial values."""
    settings = {
        "r": 4,
        "target_modules": "all-linear",
        "aux_loss_weight": BETA,
        "aux_loss_decay": ALPHA,
        "aux_loss_schedule": "constant",
        **fields,
    }
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(architecture), CAFTConfig(**settings)).train()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("auxiliary_heads" in name and parameter.dim() == 2):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def shared(architecture: str = "llama", head_type: str = "decoder_layer"):
    """For tests that leave the model as it is."""
    return caft(architecture, head_type=head_type)


SMALL = {"head_type": "residual", "num_auxiliary_heads": 2, "target_modules": ["q_proj"]}  # where no layer matters


def gradients(model, loss) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_equal_to_reference(model, labels, inputs, reference_inputs=None, gamma=1.0, **reference) -> None:
    loss = model(labels=labels, **inputs).loss
    heads = model.auxiliary_heads["default"]
    expected = reference_loss(
        model.get_base_model(),
        list(heads.heads),
        labels,
        beta=BETA,
        gamma=gamma,
        alpha=ALPHA,
        head_input=heads.config.head_input,
        **reference,
        **(inputs if reference_inputs is None else reference_inputs),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    got, wanted = gradients(model, loss), gradients(model, expected)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_lora_gradients_equal_the_reference(architecture, head_type):
    assert_equal_to_reference(shared(architecture, head_type), tokens(), {"input_ids": tokens()})


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != "llama")],
)
def test_any_number_of_heads_equals_the_reference(architecture, head_type, n):
    model = caft(architecture, head_type=head_type, num_auxiliary_heads=n - 1)
    assert len(model.auxiliary_heads["default"].heads) == n - 1
    assert_equal_to_reference(model, tokens(), {"input_ids": tokens()})


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("head_input", ["last_layer_input", "last_hidden_state"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_every_input_and_depth_of_heads_equals_the_reference(head_type, head_input, layers):
    model = caft("gemma2", head_type=head_type, head_input=head_input, head_num_layers=layers)
    assert_equal_to_reference(model, tokens(), {"input_ids": tokens()})


@pytest.mark.parametrize("train_heads", ["lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_trained_heads_get_the_references_gradient(head_type, train_heads):
    model = caft(head_type=head_type, train_heads=train_heads)
    trained = [name for name, p in model.named_parameters() if "auxiliary_heads" in name and p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained) == (train_heads == "lora")
    assert_equal_to_reference(model, tokens(), {"input_ids": tokens()})


def test_frozen_heads_and_base_get_no_gradient_while_every_lora_weight_does():
    model = caft()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_gradient_is_the_slope_of_the_loss(head_type):
    model = caft("gemma2", head_type=head_type, num_auxiliary_heads=2).double()
    batch = {"input_ids": tokens(), "labels": tokens()}
    found = gradients(model, model(**batch).loss)
    for name, parameter in [(n, p) for n, p in model.named_parameters() if p.requires_grad and "layers.1" in n]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        losses = []
        for step in (1e-3, -2e-3):
            parameter.data += step * direction
            losses.append(float(model(**batch).loss.detach()))
        parameter.data += 1e-3 * direction
        slope = (losses[0] - losses[1]) / 2e-3
        assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-3, abs=1e-4), name


def test_prompt_masked_by_minus_100_supervises_only_the_answer():
    labels = tokens().clone()
    labels[:, :6] = -100
    labels[1, 9] = -100
    assert_equal_to_reference(shared(), labels, {"input_ids": tokens()})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_is_neither_context_nor_target(architecture, head_type, side):
    labels, attention_mask = tokens().clone(), torch.ones_like(tokens())
    padding = slice(9, None) if side == "right" else slice(None, 5)
    attention_mask[1, padding] = 0
    labels[1, padding] = -100
    allowed = torch.stack([attention_mask.bool()] * 6)
    inputs = {"input_ids": tokens(), "attention_mask": attention_mask}
    assert_equal_to_reference(shared(architecture, head_type), labels, inputs, mask=allowed)


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_never_crosses_documents(architecture, head_type):
    lengths = (5, 2, 7)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = tokens(1).clone()
    allowed = torch.ones(6, 1, 14, dtype=torch.bool)
    for k in range(2, 6):
        for start, length in ((0, 5), (5, 2), (7, 7)):
            allowed[k, 0, max(start, start + length - k) : start + length] = False
    # With a cache, as by default, transformers does not look for documents in position_ids.
    inputs = {"input_ids": tokens(1), "position_ids": position_ids}
    model = shared(architecture, head_type)
    assert_equal_to_reference(model, labels, {**inputs, "use_cache": False}, reference_inputs=inputs, mask=allowed)


@pytest.mark.parametrize("count", [77, torch.tensor(77)], ids=["int", "tensor"])
def test_all_terms_are_divided_by_num_items_in_batch(count):
    inputs = {"input_ids": tokens()}
    assert_equal_to_reference(
        shared(), tokens(), {**inputs, "num_items_in_batch": count}, reference_inputs=inputs, divisor=77.0
    )


def test_changed_document_leaves_the_others_loss_unchanged():
    """The same promise as packing's, without the reference: what each document adds is what it adds alone."""
    model = shared()
    ids, count = tokens(1), torch.tensor(12)
    position_ids = torch.cat([torch.arange(6), torch.arange(8)])[None]
    labels = ids.clone()
    labels[0, 6] = -100  # else the first document's last token would predict the second one's first
    packed = model(
        input_ids=ids, labels=labels, position_ids=position_ids, num_items_in_batch=count, use_cache=False
    ).loss
    alone = [model(input_ids=part, labels=part, num_items_in_batch=count).loss for part in (ids[:, :6], ids[:, 6:])]
    torch.testing.assert_close(packed, sum(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("schedule", "gamma"),
    [
        ("reflected_sine", math.sin(math.pi / 2 * 0.7)),
        ("sine", math.sin(math.pi / 2 * 0.3)),
        ("linear", 0.3),
        ("linear_decay", 0.7),
        ("constant", 1.0),
    ],
)
def test_schedule_weighs_the_auxiliary_loss(schedule, gamma):
    model = caft(aux_loss_schedule=schedule, **SMALL)
    model.set_training_progress(3, 10)
    assert_equal_to_reference(model, tokens(), {"input_ids": tokens()}, gamma=gamma)


def test_tuple_outputs_carry_the_same_loss():
    model, batch = shared(), {"input_ids": tokens(), "labels": tokens()}
    torch.testing.assert_close(model(**batch, return_dict=False)[0], model(**batch).loss, rtol=1e-6, atol=0)


def test_batch_without_supervised_token_has_zero_loss_and_gradients():
    model = caft()
    loss = model(input_ids=tokens(), labels=torch.full_like(tokens(), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("length", [1, 14])
@pytest.mark.parametrize("train_heads", ["lora", "full"])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_batch_without_supervised_token_reaches_trained_heads_with_zero_gradients(head_type, train_heads, length):
    """A parameter outside the graph stops DistributedDataParallel at the next step."""
    model = caft(head_type=head_type, train_heads=train_heads)
    ids = tokens(2, length)
    model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=["saved", "lora"]
)
def test_batch_without_supervised_token_reaches_a_trained_lm_head_with_zero_gradients(fields):
    model = caft(**fields)
    model(input_ids=tokens(), labels=torch.full_like(tokens(), -100)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_sequence_shorter_than_n_trains_on_the_heads_that_have_a_target(length):
    model, ids = shared(), tokens(2, length)
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.isfinite(loss)
    gradients(model, loss)
    if length > 1:
        assert_equal_to_reference(model, ids, {"input_ids": ids})


def test_sampled_positions_leave_the_expected_loss_unchanged():
    full, sampled = caft(**SMALL), caft(**SMALL, aux_token_fraction=0.3)
    batch = {"input_ids": tokens(), "labels": tokens()}
    expected = float(full(**batch).loss.detach())
    state = torch.get_rng_state()
    with torch.enable_grad():
        losses = torch.tensor([float(sampled(**batch).loss.detach()) for _ in range(100)])
    assert torch.equal(state, torch.get_rng_state())
    standard_error = float(losses.std()) / math.sqrt(len(losses))
    assert standard_error > 0
    assert abs(float(losses.mean()) - expected) < 4 * standard_error


def test_sampling_repeats_after_a_resume():
    model, batch = caft(**SMALL, aux_token_fraction=0.3), {"input_ids": tokens(), "labels": tokens()}
    losses = []
    for step in (4, 5, 4):
        model.set_training_progress(step, 10)
        losses.append([float(model(**batch).loss.detach()) for _ in range(2)])
    assert losses[0] == losses[2]
    assert len({*losses[0], *losses[1]}) == 4


def test_total_steps_alone_counts_training_forwards():
    model = caft(**SMALL, aux_loss_schedule="linear_decay", total_steps=4)
    gammas = []
    for _ in range(6):
        model(input_ids=tokens(), labels=tokens())
        gammas.append(float(model.gamma))
    assert gammas == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_schedule_that_knows_nothing_of_the_run_is_an_error():
    model = caft(**SMALL, aux_loss_schedule="reflected_sine")
    with pytest.raises(ValueError, match=r"CAFTCallback.*set_training_progress.*constant"):
        model(input_ids=tokens(), labels=tokens())


def test_architecture_that_changes_its_logits_otherwise_is_refused():
    model = caft(**SMALL)
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(TypeError, match="LlamaForCausalLM does more between its last layer and its logits"):
        model(input_ids=tokens(), labels=tokens())


class DoubledLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_subclass_that_doubles_its_logits_keeps_its_own_loss():
    """That is of the logits before; the heads' logits are doubled as the model's are."""
    torch.manual_seed(0)
    base = DoubledLogits(CONFIGS["llama"]())
    own = base(input_ids=tokens(), labels=tokens())
    (untrained,) = AuxiliaryHeads.from_base_model(base, 1).logits(base, tokens())  # a copy of the last layer
    torch.testing.assert_close(untrained, own.logits)
    config = CAFTConfig(aux_loss_schedule="constant", aux_loss_weight=0.5)
    model = get_peft_model(base, config).train()
    for _ in range(2):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        auxiliary = 0.5 * model.base_model.read_metrics()["aux_loss"]
        assert float(loss) - auxiliary == pytest.approx(float(own.loss), rel=1e-5)


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.arange(VOCABULARY)
        return outputs


def test_subclass_that_changes_its_logits_is_refused_by_name_again_and_again():
    """Running the cell of a notebook again must not train."""
    model = get_peft_model(ShiftedLogits(CONFIGS["llama"]()), CAFTConfig(aux_loss_schedule="constant")).train()
    for _ in range(2):
        with pytest.raises(TypeError, match="ShiftedLogits does more between its last layer and its logits"):
            model(input_ids=tokens(), labels=tokens())


def test_tuple_outputs_of_a_mixture_with_router_loss_carry_the_same_loss():
    mixtral = MixtralConfig(**LLAMA_LIKE, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True)
    config = CAFTConfig(aux_loss_schedule="constant", target_modules=["q_proj"])
    model = get_peft_model(MixtralForCausalLM(mixtral), config).train()
    batch = {"input_ids": tokens(), "labels": tokens()}
    torch.testing.assert_close(model(**batch, return_dict=False)[0], model(**batch).loss, rtol=1e-6, atol=0)


def test_gamma_keeps_its_digits_in_half_precision():
    model = caft(**SMALL, aux_loss_schedule="linear").to(torch.bfloat16)
    model.set_training_progress(1, 1000)
    assert float(model.gamma) == pytest.approx(0.001, rel=1e-6)


def test_reference_itself_is_wrong_about_a_wrong_model():
    """The comparison can fail: another head, or a shift by one, moves the reference far beyond the tolerance."""
    model = shared()
    heads = list(model.auxiliary_heads["default"].heads)
    arguments = {"beta": BETA, "gamma": 1.0, "alpha": ALPHA, "input_ids": tokens()}
    loss = reference_loss(model.get_base_model(), heads, tokens(), **arguments)
    swapped = reference_loss(model.get_base_model(), heads[::-1], tokens(), **arguments)
    assert abs(float(loss - swapped)) > 1e-3


class Unshifted(LlamaForCausalLM):
    """As a model of one's own may be, or one that comes with its code."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


def test_model_that_does_not_shift_its_labels_is_refused():
    base = Unshifted(LlamaConfig(**LLAMA_LIKE))
    model = get_peft_model(base, CAFTConfig(r=2, target_modules="all-linear", total_steps=3)).train()
    with pytest.raises(TypeError, match="Unshifted compares logits with labels of the same position"):
        model(input_ids=tokens(), labels=tokens())


def test_logits_method_equals_the_reference():
    model = caft("gemma2").eval()
    heads = model.auxiliary_heads["default"]
    with torch.no_grad():
        _, expected = all_logits(model.get_base_model(), list(heads.heads), input_ids=tokens())
    for got, wanted in zip(heads.logits(model, tokens()), expected, strict=True):
        assert got.shape == (*tokens().shape, VOCABULARY)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(heads, nn.Module)
