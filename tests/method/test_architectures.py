"""Every architecture of the first table in docs/architectures.md: losses and gradients, no future leak, merge, and files, for both kinds of heads."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_caft import AuxiliaryHeads, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.method.callback import objective_of
from peft_caft.method.next_token_pass import LogitsLeftOut

from ..reference import shifted_cross_entropy
from ..support import architectures
from ..support.architectures import ARCHITECTURES, ATTENTIONS, TARGETS, attentions_of
from ..support.places import ROOT
from ..support.tiny_models import VOCABULARY, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*heads is None", "ignore:.*tie_word_embeddings:UserWarning")
BETA, ALPHA, HEADS = 0.7, 0.8, 2


def every_cell(head_types=HEAD_TYPES, attentions=ATTENTIONS, slow=lambda name, head_type: False):
    """Cells of a module's scope, so that tests that take the same model run one after the other."""
    cells = [
        pytest.param(name, attention, head_type, marks=[pytest.mark.slow] * slow(name, head_type))
        for name in ARCHITECTURES
        for attention in attentions_of(name)
        for head_type in head_types
        if attention in attentions
    ]
    return pytest.mark.parametrize(("architecture", "attention", "head_type"), cells, scope="module")


@pytest.fixture(scope="module")
def model(architecture, attention, head_type):
    """Its tests only switch between training and evaluation."""
    return caft(architecture, attention, head_type=head_type)


def caft(architecture: str, attention: str = "eager", **fields):
    """A CAFT model in training mode, with adapters and heads far from their trivial initial values."""
    settings = {
        "r": 4,
        "target_modules": TARGETS.get(architecture, "all-linear"),
        "exclude_modules": ".*vision.*|.*multi_modal.*",
        "num_auxiliary_heads": HEADS,
        "aux_loss_weight": BETA,
        "aux_loss_decay": ALPHA,
        "aux_loss_schedule": "constant",
        **fields,
    }
    base = architectures.make(architecture, attention)
    torch.manual_seed(0)
    model = get_peft_model(base, CAFTConfig(**settings)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("auxiliary_heads" in name and parameter.dim() == 2):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def labels() -> torch.Tensor:
    """The first half is a prompt, and an answer has a gap."""
    changed = tokens().clone()
    changed[:, :6] = -100
    changed[1, 9] = -100
    return changed


class Instead(nn.Module):
    """A head in the place of the model's last layer; the model may still read that layer's attributes."""

    def __init__(self, layer: nn.Module, head: nn.Sequential, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["layer"], self.head, self.returns_tuple = layer, head, returns_tuple

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states, *args, **kwargs):
        for block in self.head:
            if hasattr(block, "linear"):
                hidden_states = hidden_states + nn.functional.silu(block.linear(hidden_states))
            else:
                output = block(hidden_states, *args, **kwargs)
                hidden_states = output if isinstance(output, torch.Tensor) else output[0]
        return (hidden_states, None, None) if self.returns_tuple else hidden_states


def all_logits(model, heads, **inputs) -> list[torch.Tensor]:
    """The model's own, and what it predicts with each head in the place of its last layer: its norm, lm_head and factors come after it."""
    base = base_of(model)
    layers = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == architectures.LAYERS)
    last, outputs = layers[-1], []
    hook = last.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = [base(**inputs, use_cache=False).logits]
    hook.remove()
    try:
        for head in heads:
            layers[-1] = Instead(last, head, isinstance(outputs[0], tuple))
            logits.append(base(**inputs, use_cache=False).logits)
    finally:
        layers[-1] = last
    return logits


def base_of(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def reference_loss(model) -> torch.Tensor:
    heads, count = objective_of(model).heads_for_training().heads, (labels()[:, 1:] != -100).sum()
    own, *of_heads = all_logits(model, heads, input_ids=tokens())
    total = shifted_cross_entropy(own, labels(), 1)
    for k, logits in enumerate(of_heads, start=2):
        total = total + BETA * ALPHA ** (k - 1) * shifted_cross_entropy(logits, labels(), k)
    return total / count


def full(architecture: str, head_type: str):
    objective = {"aux_loss_weight": BETA, "aux_loss_decay": ALPHA, "aux_loss_schedule": "constant"}
    config = FullFineTuningConfig(head_type=head_type, num_auxiliary_heads=HEADS, **objective)
    model = prepare_full_fine_tuning(architectures.make(architecture), config).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.caft_objective.auxiliary_heads.parameters():
        if parameter.dim() == 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@every_cell()
def test_loss_and_gradients_equal_the_reference(model):
    require_reference(model.train())


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_fine_tuning_equals_the_reference(architecture, head_type):
    require_reference(full(architecture, head_type))


def require_reference(model) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = [model(input_ids=tokens(), labels=labels()).loss, reference_loss(model)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    got, wanted = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True) for loss in losses
    )
    largest = max(gradient.norm() for gradient in wanted if gradient is not None)
    for name, own, expected in zip(parameters, got, wanted, strict=True):
        assert (own is None) == (expected is None), name
        if expected is not None:
            assert (own - expected).norm() <= 1e-5 * expected.norm() + 1e-7 * largest, name


@every_cell()
def test_no_token_is_seen_by_those_before_it(model):
    heads, changed = model.eval().auxiliary_heads["default"], tokens().clone()
    changed[:, 8] = (changed[:, 8] + 1) % (VOCABULARY - 2)
    with torch.no_grad():
        before, after = heads.logits(model, tokens()), heads.logits(model, changed)
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first[:, :8], second[:, :8], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(first[:, 8:], second[:, 8:], rtol=1e-3)


@every_cell(attentions=("eager",))
def test_heads_are_the_same_after_a_round_trip_through_files(model, architecture, tmp_path):
    heads = model.auxiliary_heads["default"]
    heads.save_pretrained(tmp_path)
    loaded = AuxiliaryHeads.from_pretrained(tmp_path, base_model=architectures.make(architecture)).state_dict()
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@every_cell(attentions=("eager",), slow=lambda name, head_type: head_type == "residual" and name != "Mistral")
def test_files_and_merged_model_are_those_of_lora(model, architecture, tmp_path):
    plain = architectures.make(architecture)
    names = plain.state_dict().keys()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens()).logits
        lora = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert type(lora.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(lora(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert type(merged) is type(plain)
    assert merged.state_dict().keys() == names


def page_table() -> dict[str, list[str]]:
    """Architecture -> attention, residual heads, decoder-layer heads, no logits in training, queries of supervised tokens alone."""
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- architectures -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


@every_cell(head_types=("decoder_layer",))
def test_the_page_says_what_training_computes(model, architecture, attention):
    logits, queries = page_table()[architecture][3:]
    output = model.train()(input_ids=tokens(), labels=labels())
    assert logits == ("yes" if isinstance(output.logits, LogitsLeftOut) else "computed")
    assert queries in ("yes", "all tokens", *attentions_of(architecture))
    alone = model.auxiliary_heads["default"].heads[0]._at_rows.works
    assert bool(alone) == (queries in ("yes", attention))


def test_the_page_has_every_architecture_and_attention():
    """Both kinds of heads are tested above."""
    expected = {
        name: ["none" if "Mamba" in name else ", ".join(attentions_of(name)), "yes", "yes"] for name in ARCHITECTURES
    }
    assert {name: cells[:3] for name, cells in page_table().items()} == expected
    assert list(page_table()) == list(ARCHITECTURES)
