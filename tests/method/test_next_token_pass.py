"""The model's own next-token loss without its logits, and all fast paths switched off, give the same training."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_caft import CAFTCallback, CAFTConfig
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.heads.unembedding import CHUNK_SIZES, ChunkSize
from peft_caft.method.linear_cross_entropy import linear_cross_entropy
from peft_caft.method.next_token_pass import LogitsLeftOut

from ..support.tiny_models import ARCHITECTURES, LLAMA_LIKE, PECULIAR, VOCABULARY, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
SETTINGS = {"r": 4, "target_modules": "all-linear", "aux_loss_weight": 0.7, "aux_loss_schedule": "constant"}


def caft(architecture="llama", base=None, **fields):
    torch.manual_seed(0)
    model = get_peft_model(base or tiny_model(architecture), CAFTConfig(**SETTINGS | fields)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("auxiliary_heads" in name and parameter.dim() == 2):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def shared(architecture="llama", head_type="decoder_layer"):
    """For tests that leave the model as it is."""
    return caft(architecture, head_type=head_type)


def half_supervised(batch: int = 2):
    labels = tokens(batch).clone()
    labels[:, :7] = -100
    return labels


def loss_and_gradients(model, **batch):
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same_with_fast_paths_off(model, tolerance=1e-5, **batch):
    loss, gradients = loss_and_gradients(model, **batch)
    with model.fast_paths_enabled(False):
        expected_loss, expected = loss_and_gradients(model, **batch)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7 * largest, name


def test_unembedding_is_gathered_once_in_a_pass(monkeypatch):
    """Under ZeRO-3 that is a copy of it from all processes."""
    model, gathered = caft(), []
    monkeypatch.setattr("peft_caft.heads.backbone.whole", lambda parameter: gathered.append(parameter) or parameter)
    for passes in (1, 2):
        model(input_ids=tokens(), labels=half_supervised()).loss.backward()
        assert len(gathered) == passes + 1  # once before the first pass, to verify the architecture


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *PECULIAR])
def test_fast_paths_change_nothing(architecture, head_type):
    assert_same_with_fast_paths_off(shared(architecture, head_type), input_ids=tokens(), labels=half_supervised())


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*ARCHITECTURES, *PECULIAR] if name != "llama"),
    ],
)
def test_fast_paths_change_nothing_where_heads_see_some_of_the_tokens(architecture, head_type):
    model = caft(architecture, head_type=head_type, aux_token_fraction=0.5)
    model.set_training_progress(1, 2)  # the same draw in both
    loss, gradients = loss_and_gradients(model, input_ids=tokens(), labels=half_supervised())
    model.set_training_progress(1, 2)
    with model.fast_paths_enabled(False):
        expected_loss, expected = loss_and_gradients(model, input_ids=tokens(), labels=half_supervised())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("train_heads", ["lora", "full"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_fast_paths_change_nothing_where_heads_are_trained(head_type, train_heads):
    model = caft(head_type=head_type, train_heads=train_heads)
    assert_same_with_fast_paths_off(model, input_ids=tokens(), labels=half_supervised())


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_fast_paths_change_nothing_under_gradient_checkpointing(head_type):
    model = caft(head_type=head_type)
    model.gradient_checkpointing_enable()
    assert_same_with_fast_paths_off(model, input_ids=tokens(), labels=half_supervised())


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_router_loss_of_a_mixture_is_kept(head_type):
    config = MixtralConfig(**LLAMA_LIKE, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True)
    torch.manual_seed(0)
    model = caft(base=MixtralForCausalLM(config), head_type=head_type, target_modules=["q_proj", "o_proj"])
    batch = {"input_ids": tokens(), "labels": half_supervised()}
    output = model(**batch)
    assert isinstance(output.logits, LogitsLeftOut)
    assert output.aux_loss > 0
    assert_same_with_fast_paths_off(model, **batch)


@pytest.mark.parametrize("divisor", [None, 40, torch.tensor(40)], ids=["none", "int", "tensor"])
def test_loss_is_divided_as_transformers_divides_it(divisor):
    batch = {"input_ids": tokens(), "labels": half_supervised(), "num_items_in_batch": divisor}
    assert_same_with_fast_paths_off(shared(), **batch)


@pytest.mark.parametrize(("most", "together"), [(1000, [56]), (14, [28, 28]), (7, [14, 14, 14, 14])])
def test_residual_heads_share_products_until_these_are_large(most, together, monkeypatch):
    """Small products are slow, and the activations of heads that wait for their turn take memory."""
    sizes = []

    def recorded(states, *args):
        sizes.append(len(states))
        return linear_cross_entropy(states, *args)

    monkeypatch.setattr("peft_caft.method.loss.linear_cross_entropy", recorded)
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(most * VOCABULARY))
    model = shared("llama", "residual")
    assert_same_with_fast_paths_off(model, input_ids=tokens(), labels=half_supervised())
    assert sizes == together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_half_precision_is_no_worse_than_that_of_the_plain_way(head_type, dtype):
    """Against fp32, with the same rounded weights; mean over seeds, since a single error is a matter of luck."""
    half, exact = (caft(base=tiny_model("llama", num_hidden_layers=2), head_type=head_type) for _ in range(2))
    half.to(dtype)
    exact.load_state_dict(half.state_dict())
    ratios = []
    for seed in range(6):
        batch = {"input_ids": tokens(seed=seed), "labels": tokens(seed=seed)}
        _, expected = loss_and_gradients(exact, **batch)

        def error(batch=batch, expected=expected):
            _, gradients = loss_and_gradients(half, **batch)
            return sum(float((gradients[name].float() - g).square().sum()) for name, g in expected.items()) ** 0.5

        ours = error()
        with half.fast_paths_enabled(False):
            ratios.append(ours / error())
    assert sum(ratios) / len(ratios) <= 1.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_autocast_trains_as_it_does_the_plain_way(head_type, dtype):
    with torch.autocast("cpu", dtype=dtype):
        assert_same_with_fast_paths_off(shared("llama", head_type), 3e-2, input_ids=tokens(), labels=half_supervised())


def test_gradients_that_fp16_cannot_hold_unscaled_survive_a_scaled_loss():
    """Times beta / divisor they are too small for fp16; a gradient scaler's factor comes only in the backward pass."""
    model = caft(aux_loss_weight=1e-4).half()
    batch = {"input_ids": tokens(), "labels": half_supervised(), "num_items_in_batch": 3000}

    def auxiliary_gradient(scale: float):
        grads = []
        for enabled in (True, False):
            model.zero_grad()
            with model.auxiliary_loss_enabled(enabled):
                (model(**batch).loss * scale).backward()
            grads.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
        return (grads[0] - grads[1]) / scale

    got = auxiliary_gradient(2.0**14)
    with model.fast_paths_enabled(False):
        expected = auxiliary_gradient(2.0**14)
    assert expected.norm() > 0
    assert 0.5 < got.norm() / expected.norm() < 2


def test_logits_are_left_out_in_training_unless_asked_for():
    model = caft()
    batch = {"input_ids": tokens(), "labels": half_supervised()}
    lean = model(**batch)
    assert isinstance(lean.logits, LogitsLeftOut)
    full = model(**batch, logits_to_keep=0)
    assert full.logits.shape == (*tokens().shape, VOCABULARY)
    torch.testing.assert_close(lean.loss, full.loss, rtol=1e-6, atol=0)
    assert model.eval()(**batch).logits.shape == (*tokens().shape, VOCABULARY)


def test_the_lm_head_sees_no_token():
    """But a few at first, to see that the logits are those that the heads rely on."""
    model = caft()
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens())
    assert [tuple(states.shape[:2]) for states in seen] == [(2, 0), (1, 4), (2, 0)]


@pytest.mark.parametrize(
    "fields",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=["saved", "lora"],
)
def test_trained_lm_head_computes_its_logits_and_learns(fields):
    model = caft(**fields)
    output = model(input_ids=tokens(), labels=tokens())
    assert isinstance(output.logits, torch.Tensor)
    output.loss.backward()
    trained = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    assert trained
    assert any(p.grad.abs().sum() > 0 for p in trained)


def test_trained_bias_of_the_lm_head_learns_from_all_losses():
    base = tiny_model("llama")
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    model = caft(base=base, bias="all")
    assert isinstance(model(input_ids=tokens(), labels=tokens()).logits, LogitsLeftOut)
    assert base.lm_head.bias.requires_grad
    assert_same_with_fast_paths_off(model, input_ids=tokens(), labels=half_supervised())


class OwnLoss(LlamaForCausalLM):
    """A model that shifts labels itself and knows nothing of shifted ones, as some models with images do."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("shift_labels", "num_items_in_batch")}
        output = super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


def test_model_that_computes_its_loss_otherwise_is_left_to_do_so():
    torch.manual_seed(0)
    model = caft(base=OwnLoss(LlamaConfig(**LLAMA_LIKE)))
    for _ in range(2):
        assert isinstance(model(input_ids=tokens(), labels=half_supervised()).logits, torch.Tensor)
    assert_same_with_fast_paths_off(model, input_ids=tokens(), labels=half_supervised())


def test_model_with_another_loss_function_keeps_it():
    model = caft()
    seen = []

    def loss_function(logits, labels, **kwargs):
        seen.append(logits.shape)
        return logits.float().square().mean()

    model.get_base_model().loss_function = loss_function
    assert isinstance(model(input_ids=tokens(), labels=tokens()).logits, torch.Tensor)
    assert seen == [(*tokens().shape, VOCABULARY)]


def test_trainer_evaluates_with_compute_metrics(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(8)]
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    trainer = Trainer(
        caft(),
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        callbacks=[CAFTCallback()],
    )
    trainer.train()
    assert shapes == [(8, 14, VOCABULARY)] * 2
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_no_tensor_of_a_vocabulary_for_every_token_is_kept_for_the_backward_pass(head_type):
    vocabulary, length = 4096, 128
    config = LlamaConfig(**LLAMA_LIKE | {"vocab_size": vocabulary, "max_position_embeddings": length})
    ids = torch.randint(vocabulary, (1, length))
    kept = {}
    for name, settings in (
        ("caft", CAFTConfig(**SETTINGS, head_type=head_type)),
        ("lora", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    ):
        model = get_peft_model(LlamaForCausalLM(config), settings).train()
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def pack(tensor, known=known, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, labels=ids)
        kept[name] = max(sizes.values())
    assert kept["lora"] >= vocabulary * length * 4
    assert kept["caft"] < kept["lora"] / 10
