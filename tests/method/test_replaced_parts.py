"""Parts of the model that are replaced after the adapter was made, adapters that change the lm_head, and what an exception leaves behind."""

import copy
import gc
import sys
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import peft_caft
from peft_caft import AuxiliaryHeads, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.watched_pass import Captured

from ..support.tiny_checkpoint import tiny_llama
from ..support.tiny_models import VOCABULARY, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*heads is None")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OBJECTIVE = {"num_auxiliary_heads": 2, "aux_loss_weight": 1.0, "aux_loss_schedule": "constant"}


def caft_model(base=None, **fields):
    base = base or tiny_model("llama")
    torch.manual_seed(0)
    return get_peft_model(base, CAFTConfig(**LORA | OBJECTIVE | fields)).train()


def lora_model(base=None, **fields):
    base = base or tiny_model("llama")
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**LORA | fields, task_type="CAUSAL_LM")).train()


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-6)


# Replaced after get_peft_model (huggingface/peft#334, #2898, huggingface/transformers#22778).


@pytest.mark.parametrize("first", ["a step", "nothing"])
@pytest.mark.parametrize("size", [VOCABULARY + 3, VOCABULARY - 3])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_vocabulary_may_be_resized_after_the_adapter_is_made(head_type, size, first):
    """Loss and gradients are those of an adapter that is made after the resize."""
    ids = tokens() % (VOCABULARY - 3)
    if size > VOCABULARY:
        ids[0, 5] = size - 1
    base = tiny_model("llama")
    base.resize_token_embeddings(size, mean_resizing=False)
    resized_first = caft_model(base, head_type=head_type)
    model = caft_model(head_type=head_type)
    if first == "a step":
        loss_and_gradients(model, tokens() % (VOCABULARY - 3))
    model.resize_token_embeddings(size, mean_resizing=False)
    for name, parameter in model.get_base_model().named_parameters():  # a resize draws the new rows
        if "lora_" not in name:
            parameter.data = resized_first.get_base_model().get_parameter(name).data.clone()
    require_equal(loss_and_gradients(model, ids), loss_and_gradients(resized_first, ids))


@pytest.mark.parametrize("first", ["a step", "nothing"])
def test_lm_head_that_is_replaced_is_taken_or_refused(first):
    model = caft_model()
    if first == "a step":
        model(input_ids=tokens(), labels=tokens())
    other = nn.Linear(32, VOCABULARY, bias=True).requires_grad_(False)
    model.get_base_model().lm_head = other
    expected = caft_model(_with_lm_head(copy.deepcopy(other)))
    require_equal(loss_and_gradients(model, tokens()), loss_and_gradients(expected, tokens()))

    class TwoLayers(nn.Linear):
        def forward(self, states):
            return super().forward(torch.tanh(states))

    model.get_base_model().lm_head = TwoLayers(32, VOCABULARY, bias=False)
    with pytest.raises(
        TypeError, match=r"LlamaForCausalLM does more between its last layer and its logits .*lm_head differ"
    ):
        model(input_ids=tokens(), labels=tokens())


def _with_lm_head(lm_head):
    base = tiny_model("llama")
    base.lm_head = lm_head
    return base


def test_layers_may_be_taken_away_or_added():
    model = caft_model()
    model(input_ids=tokens(), labels=tokens())
    base = model.get_base_model()
    base.model.layers = base.model.layers[:2]
    base.config.num_hidden_layers = 2
    loss_and_gradients(model, tokens())
    assert model.base_model._backbone.last_layer is base.model.layers[1]


def test_full_fine_tuning_follows_a_resize_too():
    with torch.random.fork_rng():
        base = tiny_model("llama")
        base.resize_token_embeddings(VOCABULARY + 3)
    config = FullFineTuningConfig(**OBJECTIVE)
    before = prepare_full_fine_tuning(copy.deepcopy(base), config).train()
    after = prepare_full_fine_tuning(tiny_model("llama"), config).train()
    after.resize_token_embeddings(VOCABULARY + 3)
    after.load_state_dict(base.state_dict())
    ids = tokens().clone()
    ids[0, 5] = VOCABULARY + 1
    require_equal(loss_and_gradients(after, ids), loss_and_gradients(before, ids))


@pytest.mark.parametrize("replication", [[[0, 2], [1, 3]], [[0, 2], [1, 2]], [[0, 3], [0, 3]]])
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_replicated_layers_train(head_type, replication):
    """huggingface/peft#1368, #1707, axolotl-ai-cloud/axolotl#1445. Without weight the loss is LoRA's; the heads stand on the new last layer."""
    expected = lora_model(layer_replication=replication)(input_ids=tokens(), labels=tokens()).loss
    fields = {"layer_replication": replication, "head_type": head_type}
    plain = caft_model(aux_loss_weight=0.0, **fields)(input_ids=tokens(), labels=tokens()).loss
    assert plain == expected
    model = caft_model(**fields)
    layers = model.get_base_model().model.layers
    assert len(layers) == sum(end - start for start, end in replication)
    assert model.base_model._backbone.last_layer is layers[-1]
    got = loss_and_gradients(model, tokens())
    with model.base_model.fast_paths_enabled(False):
        require_equal(loss_and_gradients(model, tokens()), got)
    assert got[0] > expected


# Heads behind a changed unembedding (unslothai/unsloth#3444).


@pytest.mark.parametrize(
    "changed",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["norm"]},
    ],
)
def test_adapter_that_changes_what_the_heads_use_is_named(changed):
    part = "norm" if changed == {"modules_to_save": ["norm"]} else "lm_head"
    with pytest.warns(
        UserWarning,
        match=f"^{part}: an adapter changes it .*auxiliary heads keep using the base model's frozen {part}",
    ):
        caft_model(tiny_llama(tie_word_embeddings=True), **changed)(
            input_ids=tokens(), labels=tokens()
        )  # shows the norm


@pytest.mark.filterwarnings("error:.*an adapter changes it")
def test_parts_before_the_layers_are_not():
    """GPT-2's embedding of positions stands beside its final norm."""
    model = caft_model(tiny_model("gpt2"), target_modules=["c_attn"], modules_to_save=["wpe"])
    model(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapter_that_takes_part_of_the_lm_head_into_itself_is_refused(kind):
    """Heads would go on with what is left of it."""
    with pytest.raises(ValueError, match=f"init_lora_weights: got '{kind}' for the lm_head"):
        caft_model(target_modules=["q_proj", "lm_head"], init_lora_weights=kind)
    caft_model(target_modules=["q_proj", "lm_head"])


def test_heads_of_an_adapter_that_failed_are_no_other_adapters():
    model = caft_model()
    with pytest.raises(ValueError, match="no_such_module"):
        model.add_adapter("wrong", CAFTConfig(**OBJECTIVE, target_modules=["no_such_module"]))
    model.add_adapter("inference", CAFTConfig(**LORA | OBJECTIVE, inference_mode=True))
    assert list(model.auxiliary_heads) == ["default"]


@pytest.mark.filterwarnings("error:.*an adapter changes it")
@pytest.mark.parametrize(
    "plain",
    [{"target_modules": "all-linear"}, {"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_other_adapters_are_not(plain):
    """The input embedding of a model that does not tie it to the lm_head is no part of the heads."""
    caft_model(tiny_llama(), **plain)


# Another adapter in the place of one, or beside it.


@pytest.fixture
def saved(tmp_path):
    model = caft_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_adapter_takes_the_place_of_another(saved):
    model = caft_model()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    peft_caft.load_adapter(model, saved)
    expected = peft_caft.load_adapter(tiny_model("llama"), saved).train()
    require_equal(loss_and_gradients(model, tokens()), loss_and_gradients(expected, tokens()))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8},
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
        {"rank_pattern": {"v_proj": 2}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_adapter_of_another_rank_is_refused_and_nothing_is_lost(fields, saved):
    model = caft_model(**fields)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"cannot be loaded as an adapter of the base model|Load it under another name"
    ):
        peft_caft.load_adapter(model, saved)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aux_loss_decay": 0.5}, r"aux_loss_decay: got 0.8, expected 0.5\."),
        ({"lora_alpha": 64}, r"lora_alpha: got 8, expected 64\."),
        ({"use_rslora": True}, r"use_rslora: got False, expected True\."),
    ],
)
def test_adapter_that_was_trained_otherwise_is_refused(fields, message, saved):
    model = caft_model(**fields)
    with pytest.raises(ValueError, match=message + " Load it under another name"):
        peft_caft.load_adapter(model, saved)
    peft_caft.load_adapter(model, saved, "second")


def test_pefts_own_ways_to_exchange_an_adapter(saved):
    """`PeftModel.load_adapter` does it under the old name; under a new one, and in hotswap_adapter, PEFT refuses the other type."""
    model = caft_model()
    model.load_adapter(saved, "default", is_trainable=True)
    expected = peft_caft.load_adapter(tiny_model("llama"), saved).train()
    require_equal(loss_and_gradients(model, tokens()), loss_and_gradients(expected, tokens()))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(saved, "second")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: CAFT and LORA"):
        hotswap_adapter(model, saved, "default")
    assert list(model.peft_config) == ["default"]
    loaded = PeftModel.from_pretrained(tiny_model("llama"), saved)  # plain LoRA, which hot-swapping is made for
    hotswap_adapter(loaded, saved, "default")


# After an exception (ipython/ipython#11572, pytorch/pytorch#22684): a notebook keeps the last traceback.


class Stop(BaseException):
    """Neither Exception, as KeyboardInterrupt, nor caught by torch's hooks."""


def full_model():
    return prepare_full_fine_tuning(tiny_model("llama"), FullFineTuningConfig(**OBJECTIVE)).train()


def parts(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "embedding": base.get_input_embeddings(),
        "first layer": base.model.layers[0],
        "last layer": base.model.layers[-1],
        "norm": base.model.norm,
        "lm_head": base.lm_head,
    }


def number_of_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [Stop, torch.OutOfMemoryError])
@pytest.mark.parametrize("first", ["a step", "nothing"])
@pytest.mark.parametrize("place", ["embedding", "first layer", "last layer", "norm", "lm_head", "head"])
@pytest.mark.parametrize("make", [caft_model, full_model])
def test_nothing_stays_on_a_model_after_an_exception(make, place, first, error):
    model = make()
    hooks = number_of_hooks(model)
    if first == "a step":
        model(input_ids=tokens(), labels=tokens())
    heads = next(m for m in model.modules() if isinstance(m, AuxiliaryHeads))
    part = heads.heads[0][0] if place == "head" else parts(model)[place]

    def stop(*_):
        raise error

    hook = part.register_forward_hook(stop)
    try:
        model(input_ids=tokens(), labels=tokens(), **({"logits_to_keep": 0} if place == "lm_head" else {}))
    except (Stop, RuntimeError) as caught:
        sys.last_exc = caught  # what IPython does
    else:
        pytest.fail("the hook did not run")
    hook.remove()
    try:
        if make is caft_model:  # torch calls no hook after such an exception: full fine-tuning tidies in the next pass
            assert number_of_hooks(model) == hooks
        alive = []
        for _ in range(3):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            gc.collect()
            alive.append(sum(isinstance(thing, Captured) for thing in gc.get_objects()))
        assert number_of_hooks(model) == hooks
        assert alive[0] == alive[-1] <= 2  # those of the exception itself
    finally:
        del sys.last_exc


def test_a_step_keeps_nothing_of_the_one_before():
    model = caft_model()
    seen = []
    hook = model.get_base_model().model.register_forward_hook(
        lambda m, a, output: seen.append(weakref.ref(output.last_hidden_state))
    )
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=tokens(), labels=tokens()).loss.backward()
    hook.remove()
    gc.collect()
    assert [reference() for reference in seen[:-1]] == [None] * (len(seen) - 1)
