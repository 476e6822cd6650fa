"""Soft targets: the chunked loss of all heads against full logits written as plainly as the definition."""

import pytest
import torch
from torch import nn

from peft_caft import AuxiliaryHeads
from peft_caft.heads.backbone import Backbone
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.heads.unembedding import CHUNK_SIZES, ChunkSize, Unembedding
from peft_caft.method.loss import auxiliary_loss
from peft_caft.method.targets import Supervision
from peft_caft.training.soft_targets import soft_auxiliary_loss, soft_cross_entropy

from ..reference import all_logits
from ..support.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

IGNORE = -100


def naive(states, rows, teacher, layer):
    """One sum per head, with the logits of everything at once."""
    logits_of = lambda x: layer.logits(x.to(layer.weight.dtype))  # noqa: E731
    target = logits_of(teacher).softmax(dim=1)
    return [-(target[r] * logits_of(s).log_softmax(dim=1)).sum() for s, r in zip(states, rows, strict=True)]


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "softcap"])
def test_soft_cross_entropy_equals_full_logits(kind, chunk_rows, monkeypatch):
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(chunk_rows * 37))
    torch.manual_seed(0)
    layer = Unembedding(
        weight=torch.randn(37, 8, dtype=torch.float64),
        bias=torch.randn(37, dtype=torch.float64) if kind == "bias" else None,
        scale=0.3 if kind == "scale" else 1.0,
        softcap=2.0 if kind == "softcap" else None,
    )
    teacher = torch.randn(11, 8, dtype=torch.float64)
    rows = [torch.arange(11), torch.tensor([1, 2, 5, 10]), torch.tensor([], dtype=torch.long)]
    ours, theirs = ([torch.randn(len(r), 8, dtype=torch.float64, requires_grad=True) for r in rows] for _ in range(2))
    for own, other in zip(ours, theirs, strict=True):
        other.data.copy_(own.data)
    weights = [1.0, 0.5, 2.0]
    sums = soft_cross_entropy(ours, rows, teacher, layer)
    expected = naive(theirs, rows, teacher, layer)
    torch.testing.assert_close(torch.stack(sums), torch.stack(expected))
    sum(w * s for w, s in zip(weights, sums, strict=True)).backward()
    sum(w * s for w, s in zip(weights, expected, strict=True)).backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_half_precision_is_no_worse_than_naive_half_precision():
    torch.manual_seed(0)
    exact = Unembedding(torch.randn(500, 64) / 8)
    half = Unembedding(exact.weight.bfloat16())
    states, teacher = torch.randn(40, 64), torch.randn(40, 64)
    rows = [torch.arange(40)]

    def gradient(function, layer, dtype):
        x = states.to(dtype).detach().clone().requires_grad_()
        function([x], rows, teacher.to(dtype), layer)[0].backward()
        return x.grad.float()

    expected = gradient(naive, exact, torch.float32)
    error = (gradient(soft_cross_entropy, half, torch.bfloat16) - expected).norm()
    assert error <= 1.1 * (gradient(naive, half, torch.bfloat16) - expected).norm()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_k_learns_what_the_model_predicts_from_the_tokens_before(architecture, head_type):
    model = tiny_model(architecture)
    torch.manual_seed(1)
    input_ids = torch.randint(1, VOCABULARY, (2, 13))
    labels = input_ids.clone()
    labels[0, :5] = IGNORE
    labels[1, 9:] = IGNORE
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = 0
    heads = AuxiliaryHeads.from_base_model(model, 3, head_type)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    backbone = Backbone.of(model)
    with backbone.capture() as records, torch.no_grad():
        backbone.trunk(input_ids=input_ids, attention_mask=mask, use_cache=False)
    auxiliary = soft_auxiliary_loss(
        heads,
        backbone,
        records[-1],
        Supervision.of(labels, 3, {"attention_mask": mask}, draw_predicted=True),
        decay=0.8,
    )

    own_logits, head_logits = all_logits(model, list(heads.heads), input_ids=input_ids, attention_mask=mask)
    teacher = own_logits.detach().softmax(dim=-1)
    for k, (logits, total, count) in enumerate(
        zip(head_logits, auxiliary.sums, auxiliary.counts, strict=True), start=2
    ):
        losses = nn.functional.cross_entropy(
            logits[:, :-k].transpose(1, 2), teacher[:, k - 1 : -1].transpose(1, 2), reduction="none"
        )
        supervised = labels[:, k:] != IGNORE
        assert count == supervised.sum()
        torch.testing.assert_close(total, losses[supervised].sum(), rtol=1e-5, atol=1e-4)
    auxiliary.total.backward()
    ours = [p.grad.clone() for p in heads.parameters()]
    heads.zero_grad()
    expected = sum(
        0.8 ** (k - 1)
        * nn.functional.cross_entropy(
            logits[:, :-k].transpose(1, 2), teacher[:, k - 1 : -1].transpose(1, 2), reduction="none"
        )[labels[:, k:] != IGNORE].sum()
        for k, logits in enumerate(head_logits, start=2)
    )
    expected.backward()
    for own, parameter in zip(ours, heads.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_loss_is_least_when_the_head_predicts_as_the_model_does():
    torch.manual_seed(0)
    layer = Unembedding(torch.randn(23, 6))
    teacher = torch.randn(9, 6)
    (least,) = soft_cross_entropy([teacher.clone().requires_grad_()], [torch.arange(9)], teacher, layer)
    probabilities = layer.logits(teacher).softmax(dim=1)
    torch.testing.assert_close(least, -(probabilities * probabilities.log()).sum())
    (other,) = soft_cross_entropy([teacher + 0.1], [torch.arange(9)], teacher, layer)
    assert other > least


@pytest.mark.parametrize("loss_of", [auxiliary_loss, soft_auxiliary_loss])
def test_drawn_positions_leave_the_expected_gradient_unchanged(loss_of):
    model = tiny_model("llama")
    input_ids = torch.randint(1, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
    heads = AuxiliaryHeads.from_base_model(model, 3, "residual")
    backbone = Backbone.of(model)
    with backbone.capture() as records, torch.no_grad():
        backbone.trunk(input_ids=input_ids, use_cache=False)

    def gradient(**sampling):
        heads.zero_grad()
        supervision = Supervision.of(input_ids, 3, draw_predicted=loss_of is soft_auxiliary_loss, **sampling)
        auxiliary = loss_of(heads, backbone, records[-1], supervision, decay=0.8)
        assert auxiliary.counts == [4 * (24 - k) for k in (2, 3, 4)]  # of all positions
        auxiliary.total.backward()
        return torch.cat([p.grad.flatten() for p in heads.parameters()])

    state = torch.get_rng_state()
    exact = gradient()
    drawn = torch.stack([gradient(fraction=0.25, seed=seed) for seed in range(300)])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn[3], gradient(fraction=0.25, seed=3))
    off = drawn.mean(dim=0) - exact
    standard_error = drawn.std(dim=0) / len(drawn) ** 0.5
    # The squared deviation of each entry is its squared standard error on average, if the estimate has no bias.
    ratio = float(off.square().sum() / standard_error.square().sum())
    assert 0.4 < ratio < 2
    assert (drawn - exact).norm(dim=1).mean() > 0.1 * exact.norm()  # it is an estimate at all


def test_all_heads_draw_the_same_predicted_tokens(monkeypatch):
    """One row of the base model's logits serves every head, so that a fraction of them is computed."""
    seen = []
    monkeypatch.setattr(
        "peft_caft.training.soft_targets.soft_cross_entropy",
        lambda states, rows, teacher, layer: seen.append(len(teacher)) or [s.sum() for s in states],
    )
    model = tiny_model("llama")
    input_ids = torch.randint(1, VOCABULARY, (8, 64))
    heads, backbone = AuxiliaryHeads.from_base_model(model, 4, "residual"), Backbone.of(model)
    with backbone.capture() as records, torch.no_grad():
        backbone.trunk(input_ids=input_ids, use_cache=False)
    for fraction in (1.0, 0.25):
        supervision = Supervision.of(input_ids, 4, fraction=fraction, draw_predicted=True)
        soft_auxiliary_loss(heads, backbone, records[-1], supervision, decay=0.8)
    assert seen[1] < 0.35 * seen[0]
