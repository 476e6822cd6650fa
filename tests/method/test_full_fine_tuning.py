"""Full fine-tuning with the objective of CAFT: gradients of every parameter, a model that stays plain, and trainers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_caft import AuxiliaryHeads, CAFTCallback, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.config import HEAD_TYPES
from peft_caft.method.next_token_pass import LogitsLeftOut

from ..reference import reference_loss
from ..support.tiny_checkpoint import tiny_llama
from ..support.tiny_models import ARCHITECTURES, PECULIAR, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:FullFineTuningConfig.heads is None")
ALPHA, BETA = 0.8, 0.7
STEPS, ROWS = 4, 12
CONSTANT = {"aux_loss_weight": BETA, "aux_loss_schedule": "constant", "num_auxiliary_heads": 3}


def full(model=None, **fields):
    model = prepare_full_fine_tuning(model or tiny_model("llama"), FullFineTuningConfig(**CONSTANT | fields)).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.caft_objective.auxiliary_heads.parameters():
        if parameter.dim() == 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    labels = tokens(seed=seed).clone()
    labels[:, :5] = -100
    return {"input_ids": tokens(seed=seed), "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("train_heads", ["frozen", "full"])
@pytest.mark.parametrize("freeze_unembedding", [False, True])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_all_gradients_are_those_of_the_equation(architecture, head_type, freeze_unembedding, train_heads):
    model = full(
        tiny_model(architecture), head_type=head_type, freeze_unembedding=freeze_unembedding, train_heads=train_heads
    )
    loss = model(**batch()).loss
    loss.backward()
    got = gradients(model)
    model.zero_grad()
    with model.caft_objective.auxiliary_loss_enabled(False):
        expected = reference_loss(
            model, model.caft_objective.auxiliary_heads.heads, batch()["labels"],
            beta=BETA, gamma=1.0, alpha=ALPHA, input_ids=tokens(),
        )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal(got, gradients(model))
    assert any("caft_objective" in name for name in got) == (train_heads == "full")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and "caft_objective" not in name}
    assert frozen == (
        {n for n, p in model.named_parameters() if p is model.lm_head.weight} if freeze_unembedding else set()
    )


@pytest.mark.parametrize("head_input", ["last_layer_input", "last_hidden_state"])
@pytest.mark.parametrize("architecture", ["llama", *PECULIAR])
def test_fast_paths_change_nothing(architecture, head_input):
    model = full(tiny_model(architecture), head_input=head_input, aux_token_fraction=0.5)
    objective = model.caft_objective
    found = []
    for fast in (True, False):
        objective.set_training_progress(1, 2)  # the same draw in both
        model.zero_grad()
        with objective.fast_paths_enabled(fast):
            output = model(**batch())
        assert isinstance(output.logits, LogitsLeftOut) == fast
        output.loss.backward()
        found.append(gradients(model))
    assert_equal(*found)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_gradient_checkpointing_changes_nothing_where_heads_are_trained(head_type):
    model, found = full(train_heads="full", head_type=head_type), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch()).loss.backward()
        found.append(gradients(model))
    assert_equal(*found)


def test_tied_embeddings_learn_from_all_losses_or_stay_as_they_are():
    for frozen in (False, True):
        model = full(tiny_llama(tie_word_embeddings=True), freeze_unembedding=frozen)
        model(**batch()).loss.backward()
        assert (model.get_input_embeddings().weight.grad is None) == frozen
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_in_evaluation_and_without_labels_the_model_is_the_plain_one():
    plain = tiny_model("llama")
    model = full(copy.deepcopy(plain)).eval()
    for kwargs in (batch(), {"input_ids": tokens()}):
        output, expected = model(**kwargs), plain(**kwargs)
        assert torch.equal(output.logits, expected.logits)
        assert output.loss == expected.loss if "labels" in kwargs else output.loss is None
    assert torch.equal(model.train()(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    ids = tokens(batch=1, length=4)
    assert torch.equal(
        *(m.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, plain))
    )


def test_saved_model_is_a_plain_one(tmp_path):
    plain = tiny_llama()
    names = set(plain.state_dict())
    model = full(plain)
    assert set(model.state_dict()) == names
    model.load_state_dict(model.state_dict())  # strict
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    assert "caft" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    model.eval()
    assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_detached_model_has_no_trace_of_the_objective():
    model = full(train_heads="full")
    model.caft_objective.detach_from(model)
    assert not [name for name, _ in model.named_parameters() if "caft" in name]
    assert not model._keys_to_ignore_on_save
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    output = model(**batch())
    assert torch.equal(output.loss, tiny_model("llama").train()(**batch()).loss)
    full(model)


def test_copy_trains_on_its_own():
    model = full()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(**batch()).loss.backward()
    assert_equal(gradients(twin), gradients(model))
    assert twin.caft_objective._progress.computed == 1


def test_forward_that_fails_leaves_nothing_behind():
    model = full()
    with pytest.raises(IndexError):
        model(input_ids=tokens() + 1000, labels=tokens())
    assert model.caft_objective._pass is None
    assert not model.model.layers[-1]._forward_pre_hooks
    model(**batch()).loss.backward()


def trainer(model, folder, **options) -> Trainer:
    data = [{name: value[0].tolist() for name, value in batch(seed).items()} for seed in range(ROWS)]
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **settings | options)
    return Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()])


def trained(model, folder, resume: str | None = None, **options):
    trainer(model, folder, **options).train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer_takes_the_steps_of_a_loop(options, tmp_path):
    fields = {"aux_loss_schedule": "reflected_sine"}
    start = {name: p.detach().clone() for name, p in full(**fields).named_parameters()}
    model = full(**fields)
    got = trained(model, tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, **options)
    expected = full(**fields)
    for step, seeds in enumerate(trainer_order(tmp_path)):
        expected.caft_objective.set_training_progress(step, STEPS)
        rows = [batch(seed) for seed in seeds]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("bf16", False)):
            loss = expected(**{name: torch.cat([row[name][:1] for row in rows]) for name in rows[0]}).loss
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
    assert_equal(got, {name: p.detach() for name, p in expected.named_parameters()}, tolerance=1e-6)
    assert max((got[name] - start[name]).abs().max() for name in got if "caft" not in name) > 1e-3


def trainer_order(folder) -> list[list[int]]:
    """The rows of each step, as Trainer draws them."""
    seen = trainer(full(), folder)
    ids = {tuple(tokens(seed=seed)[0].tolist()): seed for seed in range(ROWS)}
    batches = list(seen.get_train_dataloader())[:STEPS]
    return [[ids[tuple(row)] for row in one["input_ids"].tolist()] for one in batches]


@pytest.mark.parametrize("train_heads", ["frozen", "full"])
def test_resumed_run_ends_where_an_uninterrupted_one_does(train_heads, tmp_path):
    options = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = trained(full(train_heads=train_heads), tmp_path / "a", **options)
    checkpoint = tmp_path / "a" / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "caft_trained_heads.safetensors").exists() == (train_heads == "full")
    assert not [name for name in load_file(checkpoint / "model.safetensors") if "caft" in name]
    resumed = trained(full(train_heads=train_heads), tmp_path / "a", resume=str(checkpoint), **options)
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_losses_of_heads_are_logged(tmp_path):
    run = trainer(full(), tmp_path)
    run.train()
    assert {"caft/gamma", "caft/aux_loss", "caft/loss_head_2", "caft/loss_head_4"} <= run.state.log_history[0].keys()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_heads_from_a_folder_are_used(head_type, tmp_path):
    heads = AuxiliaryHeads.from_base_model(tiny_model("llama"), 3, head_type)
    for parameter in heads.parameters():
        parameter.data += 0.1
    heads.save_pretrained(tmp_path)
    model = prepare_full_fine_tuning(tiny_model("llama"), FullFineTuningConfig(heads=tmp_path, num_auxiliary_heads=2))
    assert model.caft_objective.config.head_type == head_type
    own = model.caft_objective.auxiliary_heads
    assert len(own.heads) == 2
    assert torch.equal(own.heads[1][0].get_parameter(next(iter(dict(own.heads[1][0].named_parameters())))),
                       next(heads.heads[1][0].parameters()))  # fmt: skip


@pytest.mark.parametrize(
    ("model", "fields", "error", "message"),
    [
        (lambda: get_peft_model(tiny_llama(), LoraConfig(r=2)), {}, TypeError, "with adapters.*get_peft_model"),
        (lambda: full(), {}, ValueError, "caft_objective already.*detach_from"),
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "model: got Linear"),
        (lambda: tiny_llama(), {"train_heads": "lora"}, ValueError, "train_heads: got 'lora'.*'frozen', 'full'"),
        (lambda: tiny_llama(), {"aux_loss_decay": 2.0}, ValueError, "aux_loss_decay"),
    ],
)
def test_what_cannot_be_is_refused(model, fields, error, message):
    with pytest.raises(error, match=message):
        prepare_full_fine_tuning(model(), FullFineTuningConfig(**fields))
