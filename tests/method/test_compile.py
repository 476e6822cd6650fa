"""CAFT under torch.compile: the base model is compiled once, the losses are not, and nothing else is different."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters

from peft_caft import CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning

from ..support.tiny_models import tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
# In training: up to the call of CAFT's forward; the base model up to its last layer, up to its norm, and up to its lm_head, each of
# them once with a token's logits and once without, as hooks that record hidden states part them.
GRAPHS = 8


def base_model(layers: int):
    return tiny_model("llama", attention="sdpa", num_hidden_layers=layers)


def caft(**fields):
    """Two layers, since the last one is called in another way than those before it; Dynamo takes a second to record each."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "aux_loss_weight": 0.7} | fields
    return get_peft_model(base_model(layers=2), CAFTConfig(**settings, aux_loss_schedule="constant")).train()


def gradients(call, model, input_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    labels = input_ids.clone()
    labels[:, :7] = -100
    model.zero_grad()
    loss = call(input_ids=input_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_as_eager(compiled, model, input_ids: torch.Tensor) -> None:
    loss, got = gradients(compiled, model, input_ids)
    expected_loss, expected = gradients(model, model, input_ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def assert_evaluates_as_eager(compiled, model) -> None:
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens(), labels=tokens()).loss
        torch.testing.assert_close(compiled(input_ids=tokens(), labels=tokens()).loss, expected)
    model.train()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def hooks_are_guarded(monkeypatch):
    """A graph that an evaluation made without hooks must not be used with them."""
    if torch.__version__ < "2.13":
        monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False)  # as the error below advises


# Residual heads are in the quick tests below, with both backends.
@pytest.mark.parametrize(
    ("head_type", "backend"),
    [pytest.param("residual", "eager", marks=pytest.mark.slow), ("decoder_layer", "aot_eager")],
)
@pytest.mark.usefixtures("hooks_are_guarded")
def test_compiled_model_trains_after_an_evaluation_as_an_eager_one_in_few_graphs(head_type, backend):
    model = caft(head_type=head_type)
    compiled = torch.compile(model, backend=backend)
    assert_evaluates_as_eager(compiled, model)
    of_evaluation = counters["stats"]["unique_graphs"]
    for seed in range(2):
        assert_trains_as_eager(compiled, model, tokens(seed=seed))
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs - of_evaluation <= GRAPHS
    for seed in range(2, 5):  # other numbers, the same graphs
        assert_trains_as_eager(compiled, model, tokens(seed=seed))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert_evaluates_as_eager(compiled, model)


@pytest.mark.usefixtures("hooks_are_guarded")
def test_checkpointed_model_trains_after_an_evaluation_as_an_eager_one():
    model = caft(head_type="residual")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="eager")  # the recording is at stake, whatever it is then compiled to
    assert_evaluates_as_eager(compiled, model)
    assert_trains_as_eager(compiled, model, tokens())
    assert_evaluates_as_eager(compiled, model)


def test_a_graph_without_hooks_is_an_error_that_says_what_to_do():
    model = caft()
    backbone = model.base_model._backbone
    with backbone.capture():
        backbone.last_layer._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False"):
            backbone.trunk(input_ids=tokens())


@pytest.mark.filterwarnings("ignore:FullFineTuningConfig.heads is None")
def test_full_fine_tuning_is_compiled_too():
    config = FullFineTuningConfig(aux_loss_weight=0.7, aux_loss_schedule="constant", head_type="residual")
    model = prepare_full_fine_tuning(base_model(layers=1), config).train()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        assert_trains_as_eager(compiled, model, tokens(seed=seed))
    assert 0 < counters["stats"]["unique_graphs"] <= GRAPHS
