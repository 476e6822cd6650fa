"""Before a model is trained it is run on a few tokens: its parts are found, or it is refused by name, never trained wrongly."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    RecurrentGemmaConfig,
)

from peft_caft import AuxiliaryHeads, CAFTConfig
from peft_caft.heads.backbone import Backbone

from ..support.tiny_models import LLAMA_LIKE, VOCABULARY, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None", "ignore:.*an adapter changes it")
SETTINGS = {"r": 4, "target_modules": "all-linear", "aux_loss_schedule": "constant", "num_auxiliary_heads": 2}


def llama(model_class=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    return model_class(LlamaConfig(**LLAMA_LIKE | changes))


def step(base, **fields):
    model = get_peft_model(base, CAFTConfig(**SETTINGS | fields)).train()
    return model, model(input_ids=tokens(), labels=tokens()).loss


class ScaledLogits(LlamaForCausalLM):
    """Its factor and soft cap stand in no field of the configuration that we know."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = 5.0 * torch.tanh(0.25 * output.logits / 5.0)
        return output


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = output.logits + torch.arange(VOCABULARY) * 1e-2
        return output


class MaskedLogits(LlamaForCausalLM):
    """As Chameleon does with the tokens of images."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits[..., 7] = torch.finfo(output.logits.dtype).min
        return output


class TwoNorms(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.another = nn.LayerNorm(config.hidden_size)
        self.model.norm.weight.data.uniform_(0.5, 2)  # with equal weights the second would undo the first
        self.model.register_forward_hook(self.norm_again)

    @staticmethod
    def norm_again(trunk, args, output):
        output.last_hidden_state = trunk.another(output.last_hidden_state)


class LastLayerTwice(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        first, last = self.model.layers[0], self.model.layers[-1]
        first.register_forward_hook(
            lambda module, args, output: last(output, position_embeddings=self.positions(output))
        )

    def positions(self, hidden):
        return self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])


def opt_350m():
    config = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(OPTConfig(**config, do_layer_norm_before=False))


def test_final_norm_of_any_name_is_found():
    """LFM2 calls it ``embedding_norm`` (tobi/qmd#206, sgl-project/sglang#27813)."""
    torch.manual_seed(0)
    layers = ["conv", "conv", "full_attention"]
    base = AutoModelForCausalLM.from_config(Lfm2Config(**LLAMA_LIKE, layer_types=layers))
    assert Backbone.of(base).final_norm is base.model.embedding_norm


def test_norm_of_embeddings_is_not_taken_for_it():
    """BLOOM has one, as wide and with the same initial values as its final norm."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)
    base = AutoModelForCausalLM.from_config(config)
    assert Backbone.of(base).final_norm is base.transformer.ln_f


def test_model_without_final_norm_has_none():
    torch.manual_seed(0)
    config = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 3, "vocab_size": 97}
    base = AutoModelForCausalLM.from_config(OPTConfig(**config, num_attention_heads=4, do_layer_norm_before=False))
    assert Backbone.of(base).final_norm is None


def test_factor_and_cap_are_read_off_the_model():
    known = Backbone.of(llama(ScaledLogits)).probed()
    assert known.scale == pytest.approx(0.25, rel=1e-5)
    assert known.softcap == pytest.approx(5.0, rel=1e-5)
    half = Backbone.of(llama(ScaledLogits).bfloat16()).probed()
    assert (half.scale, half.softcap) == pytest.approx((0.25, 5.0), rel=1e-2)


def test_cap_under_another_name_is_applied():
    """The configuration of RecurrentGemma calls it ``logits_soft_cap``; random logits are too small to show it."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "lru_width": 32,
    }
    base = AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(**sizes, intermediate_size=48, attention_window_size=8)
    )
    assert Backbone.of(base).probed().softcap == 30.0


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda: llama(ShiftedLogits),
            "ShiftedLogits does more between its last layer and its logits .*logits differ",
        ),
        (lambda: llama(MaskedLogits), "MaskedLogits does more .*logits differ"),
        (lambda: llama(TwoNorms), "TwoNorms does more .*final norm differ"),
        (lambda: llama(LastLayerTwice), "the last layer of LlamaModel runs more than once in a pass"),
        (opt_350m, "OPTForCausalLM does more .*final norm differ"),  # its project_out (huggingface/trl#3694)
    ],
)
def test_model_that_does_more_is_refused_by_name(make, what, head_type):
    with pytest.raises(TypeError, match=what):
        step(make(), head_type=head_type)


def test_weights_that_are_no_numbers_are_named():
    base = llama()
    base.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="of LlamaForCausalLM for a few tokens are not finite"):
        step(base)


@pytest.mark.parametrize(
    "changed",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "lm_head"]}],
)
def test_adapter_behind_the_layers_leaves_no_model_unverified(changed):
    """The model's output is then not that of the base model, which is compared all the same."""
    model, _ = step(llama(), **changed)
    assert model.base_model._backbone.verified
    with pytest.raises(TypeError, match="ShiftedLogits does more"):
        step(llama(ShiftedLogits), **changed)


def test_heads_that_are_only_looked_at_verify_the_model_too():
    base = llama(ShiftedLogits)
    with pytest.raises(TypeError, match="ShiftedLogits does more"):
        AuxiliaryHeads.from_base_model(base, 2).logits(base, tokens())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_probe_leaves_no_trace(architecture):
    model = get_peft_model(tiny_model(architecture), CAFTConfig(**SETTINGS | {"lora_dropout": 0.5})).train()
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model.base_model._backbone.probed()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks
