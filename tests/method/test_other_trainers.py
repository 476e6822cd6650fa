"""Whose step it is decides whether there is an auxiliary loss: Trainer and SFTTrainer have one, TRL's other trainers train as with LoRA."""

import warnings
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_caft import CAFTCallback, CAFTConfig
from peft_caft.method.trainer import trains_on_next_tokens

from ..support.tiny_checkpoint import tiny_llama, tiny_tokenizer
from ..support.tiny_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OBJECTIVE = {"num_auxiliary_heads": 2, "aux_loss_weight": 1.0}
SETTINGS = {
    "learning_rate": 1e-2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


def lora_model():
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(**LORA, task_type="CAUSAL_LM"))


def caft_model(**fields):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), CAFTConfig(**LORA, **OBJECTIVE | fields))


def adapter(model) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name and "auxiliary" not in name]
    )


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


# Trainers of TRL.

PREFERENCES = [{"prompt": "name ethanol", "chosen": " alcohol", "rejected": " butane"}] * 4
LABELLED = [{"prompt": "name ethanol", "completion": " alcohol", "label": bool(i % 2)} for i in range(4)]
PROMPTS = [{"prompt": "name ethanol"}] * 4


QUICK = {("GRPO", True), ("DPO", False)}


def trl_trainer(name: str, model, folder, callbacks=(CAFTCallback,), rows: int = 1, **changes):
    trl = pytest.importorskip("trl", reason="needs Python 3.11")
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    settings = SETTINGS | {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 4 // rows,
        "bf16": False,
    }
    more = {}
    settings |= changes
    if name in ("GRPO", "RLOO"):
        settings |= {"num_generations": 2, "max_completion_length": 4}
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    if name == "SFT":
        settings |= {"gradient_checkpointing": False}
    data = {"DPO": PREFERENCES, "KTO": LABELLED, "SFT": [{"text": "name ethanol alcohol butane"}] * 4}.get(
        name, PROMPTS
    )
    return getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(str(folder), **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[make() for make in callbacks],
        **more,
    )


def trained(name: str, model, folder, **options) -> torch.Tensor:
    torch.manual_seed(0)
    trl_trainer(name, model, folder, **options).train()
    return adapter(model)


@pytest.mark.parametrize(
    ("name", "callbacks"),
    [
        pytest.param(name, callbacks, marks=[] if (name, bool(callbacks)) in QUICK else pytest.mark.slow)
        for name in ("GRPO", "DPO", "KTO", "RLOO")
        for callbacks in ((CAFTCallback,), ())
    ],
)
def test_other_trainers_train_as_with_lora_and_one_warning_names_them(name, callbacks, tmp_path):
    """One row a micro-batch, as TRL's documentation recommends for GRPO (huggingface/trl#4181, #4723)."""
    rows = 2 if name == "KTO" else 1
    before = adapter(caft_model())
    expected = trained(name, lora_model(), tmp_path, callbacks=(), rows=rows)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = trained(name, caft_model(), tmp_path, callbacks=callbacks, rows=rows)
    assert torch.equal(got, expected)
    assert not torch.equal(got, before)
    told = [str(warning.message) for warning in seen if "the auxiliary loss of CAFT is off" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith(f"{name}Trainer: ")


def test_preferences_may_follow_fine_tuning_on_one_model(tmp_path):
    model = caft_model()
    sft = trl_trainer("SFT", model, tmp_path)
    sft.train()
    assert "caft/aux_loss" in sft.state.log_history[0]
    after_sft = adapter(model)
    dpo = trl_trainer("DPO", model, tmp_path)
    with pytest.warns(UserWarning, match="^DPOTrainer: the auxiliary loss of CAFT is off"):
        dpo.train()
    assert not torch.equal(adapter(model), after_sft)
    assert not any(name.startswith("caft/") for entry in dpo.state.log_history for name in entry)
    again = trl_trainer("SFT", model, tmp_path)
    again.train()
    assert "caft/aux_loss" in again.state.log_history[0]


def test_sft_trainer_needs_no_callback_with_a_constant_schedule(tmp_path):
    with_it, without = (
        trained("SFT", caft_model(aux_loss_schedule="constant"), tmp_path, callbacks=callbacks)
        for callbacks in ((CAFTCallback,), ())
    )
    assert torch.equal(with_it, without)
    assert not torch.equal(without, trained("SFT", lora_model(), tmp_path, callbacks=()))


def test_kinds_of_trainers():
    trl = pytest.importorskip("trl", reason="needs Python 3.11")

    def wants(kind: type, name: str = "Own") -> bool:
        return trains_on_next_tokens(object.__new__(type(name, (kind,), {})))

    assert wants(Trainer)
    assert wants(trl.SFTTrainer)
    for kind in (trl.GRPOTrainer, trl.RLOOTrainer, trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer):
        assert not wants(kind)
    distillation = pytest.importorskip("trl.experimental.gkd").GKDTrainer  # a subclass of SFTTrainer with another loss
    assert issubclass(distillation, trl.SFTTrainer)
    assert not wants(distillation)


# Losses of one's own.


def collate(rows):
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


class OfLogits(Trainer):
    """As in hiyouga/LlamaFactory#8746: a weighted loss of the logits."""

    asked: ClassVar[dict] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, **self.asked)
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class OfAllLogits(OfLogits):
    asked: ClassVar[dict] = {"logits_to_keep": 0}


class Sometimes(OfAllLogits):
    """In one of the micro-batches of a step its loss is that of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        self.calls = getattr(self, "calls", 0) + 1
        return outputs.loss if self.calls == 1 else loss


class Beside(OfAllLogits):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return outputs.loss


def own_trainer(kind: type[Trainer], model, folder, callbacks=(CAFTCallback,), **changes) -> Trainer:
    rows = [{"input_ids": tokens(1, 14, seed)[0].tolist()} for seed in range(8)]
    args = TrainingArguments(str(folder), **SETTINGS | changes)
    return kind(model, args, train_dataset=rows, data_collator=collate, callbacks=[make() for make in callbacks])


def test_logits_that_are_left_out_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"logits: left out in training.* logits_to_keep=0"):
        own_trainer(OfLogits, caft_model(), tmp_path).train()
    logits = caft_model(aux_loss_schedule="constant").train()(**batch()).logits
    for use in (
        lambda: logits.shape,
        lambda: logits.float(),
        lambda: nn.functional.softmax(logits, -1),
        lambda: torch.argmax(logits, dim=-1),
        lambda: logits / 2.0,
        lambda: len(logits),
        lambda: 2 - logits,
        lambda: logits**2,
        lambda: abs(logits),
        lambda: float(logits),
        lambda: logits == 0,
        lambda: list(logits),
        lambda: torch.as_tensor(logits),
    ):
        with pytest.raises((ValueError, AttributeError), match="logits: left out in training"):
            use()
    assert not hasattr(logits, "dtype")  # accelerate asks so which outputs to cast


def test_loss_that_leaves_the_auxiliary_loss_out_is_refused(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"step 1 ended without a backward pass through each auxiliary loss.*outputs.loss"
    ):
        own_trainer(OfAllLogits, caft_model(), tmp_path).train()


def test_loss_that_leaves_it_out_in_a_micro_batch_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="step 1 ended without a backward pass through each auxiliary loss"):
        own_trainer(
            Sometimes, caft_model(), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
        ).train()


class Stopped(Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def test_loop_after_a_run_that_was_stopped_must_tell_its_own_step(tmp_path):
    model = caft_model()
    with pytest.raises(KeyboardInterrupt):
        own_trainer(Stopped, model, tmp_path).train()
    with pytest.raises(ValueError, match="nobody called set_training_progress"):
        model(**batch())
    model.set_training_progress(0, 2)
    model(**batch()).loss.backward()
    again = own_trainer(Trainer, model, tmp_path)
    again.train()
    assert "caft/aux_loss" in again.state.log_history[0]


@pytest.mark.parametrize("changed", [{"train_heads": "full"}, {}])
def test_callback_does_nothing_under_another_trainer(changed, tmp_path):
    model = caft_model(**changed) if changed else lora_model()
    trl_trainer("DPO", model, tmp_path, save_strategy="steps", save_steps=1).train()
    assert not list(tmp_path.rglob("caft_trained_heads*"))
    assert list(tmp_path.rglob("checkpoint-1"))


def test_loss_with_it_is_trained(tmp_path):
    model = caft_model()
    own_trainer(Beside, model, tmp_path).train()
    plain = caft_model()
    own_trainer(Trainer, plain, tmp_path).train()
    torch.testing.assert_close(adapter(model), adapter(plain), rtol=1e-5, atol=1e-6)


def test_loop_that_leaves_it_out_is_warned_once():
    model = caft_model(aux_loss_schedule="constant").train()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(5):
            model(**batch(), logits_to_keep=0).logits.mean().backward()
    told = [str(warning.message) for warning in seen if "it trains nothing" in str(warning.message)]
    assert len(told) == 1
    assert "outputs.loss" in told[0]


@pytest.mark.filterwarnings("error:.*it trains nothing")
@pytest.mark.parametrize("together", [1, 3])
def test_loop_that_trains_it_is_not_warned(together):
    model = caft_model(aux_loss_schedule="constant").train()
    for _ in range(3):
        sum(model(**batch()).loss for _ in range(together)).backward()


def test_auxiliary_loss_that_reaches_no_adapter_is_named():
    """Frozen heads read the input of the last layer, which alone has an adapter."""
    last = caft_model(aux_loss_schedule="constant", layers_to_transform=[1]).train()
    with pytest.warns(UserWarning, match="auxiliary loss: it trains nothing, since no trained parameter"):
        last(**batch()).loss.backward()


# Calls that would be wrong in silence.


def test_copies_of_one_process_are_refused():
    replica = caft_model(aux_loss_schedule="constant").train().base_model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"nn.DataParallel: .*accelerate launch"):
        replica(**batch())


def test_cache_in_training_is_refused():
    model = caft_model(aux_loss_schedule="constant").train()
    with torch.no_grad():
        cache = model(input_ids=tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: given in training, expected none"):
        model(**batch(), past_key_values=cache)


@pytest.mark.parametrize("labels", [tokens()[:, :8], tokens()[0], tokens()[:1], torch.cat([tokens(), tokens()], 1)])
def test_labels_of_another_shape_are_refused(labels):
    model = caft_model(aux_loss_schedule="constant").train()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"labels: got shape .*, expected \(2, 14\), one for each token"):
            model(input_ids=tokens(), labels=labels)


def test_arguments_may_be_given_by_position():
    model = caft_model(aux_loss_schedule="constant").train()
    by_name = model.base_model(input_ids=tokens(), attention_mask=None, labels=tokens()).loss
    by_position = model.base_model(tokens(), None, labels=tokens()).loss
    assert by_position == by_name
