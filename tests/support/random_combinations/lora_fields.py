"""Fields of LoraConfig that a `Case` may have, for the modules that its architecture has."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import architectures
from .case import MIXTURES, Draw


@cache
def _linear_names(architecture: str) -> tuple[str, ...]:
    """Last parts of the names of linear layers in decoder layers."""
    model = architectures.make(architecture)
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(part in name for part in ("vision", "multi_modal"))
    }
    return tuple(sorted(found - {"lm_head"}))


EMBEDDINGS = {"GPT-2": "wte", "GPT-NeoX": "embed_in", "BLOOM": "word_embeddings", "Falcon": "word_embeddings",
              "Mamba": "embeddings", "Mamba 2": "embeddings"}  # fmt: skip
NORMS = {"Phi": "final_layernorm", "GPT-2": "ln_f", "GPT-NeoX": "final_layer_norm", "BLOOM": "ln_f", "Falcon": "ln_f",
         "Mamba": "norm_f", "Mamba 2": "norm_f", "OPT": "decoder.final_layer_norm"}  # fmt: skip
INNER_NORMS = {"GPT-2": "ln_1", "BLOOM": "word_embeddings_layernorm", "OPT": "self_attn_layer_norm",
               "OLMo 2": "post_attention_layernorm", "Mamba": "norm", "Mamba 2": "norm"}  # fmt: skip


def lora_fields(d: Draw, architecture: str, layers: int) -> dict[str, Any]:
    """Fields of LoraConfig."""
    linear = _linear_names(architecture)
    if architecture in ("Mamba", "Mamba 2"):
        linear = tuple(name for name in linear if name != "out_proj")  # which PEFT refuses: a case in `_spoiled`
    embedding, norm = EMBEDDINGS.get(architecture, "embed_tokens"), NORMS.get(architecture, "model.norm")
    some = d.of("targets").sample(linear, d.of("targets").randint(1, len(linear)))
    kind = d.one("targets kind", {"all-linear": 3, "list": 4, "regex": 1})
    if "Mamba" in architecture:
        kind = "list" if kind == "all-linear" else kind
        some = sorted({*some, "in_proj"})  # transformers 5.23 reads weights of others past their adapters
    peft: dict[str, Any] = {"r": d.one("r", {4: 3, 1: 1, 7: 1}), "lora_alpha": d.one("lora_alpha", {8: 3, 3: 1})}
    peft["target_modules"] = {
        "all-linear": "all-linear",
        "list": sorted(some),
        "regex": f".*({'|'.join(sorted(some))})",
    }[kind]
    more: dict[str, Any] = {
        "use_rslora": True,
        "use_dora": True,
        "lora_bias": True,
        "bias": d.one("bias", {"all": 1, "lora_only": 1}),
        "init_lora_weights": d.one("init", dict.fromkeys(["gaussian", "pissa", "olora", "orthogonal"], 1)),
        "modules_to_save": d.one("modules_to_save", {(norm,): 3, (embedding,): 2, ("lm_head",): 3, (INNER_NORMS.get(architecture, "input_layernorm"),): 1}),
        "trainable_token_indices": sorted(d.of("trainable tokens").sample(range(1, 95), 5)),
        "rank_pattern": {some[0]: 2},
        "alpha_pattern": {some[-1]: 32},
        "exclude_modules": f".*\\.{d.of('excluded').randrange(layers)}\\..*",
    }  # fmt: skip
    if kind == "list":
        more["lm_head"] = True
        more["embedding"] = True
        more["layers_to_transform"] = d.one(
            "transformed", {0: 1, layers - 1: 1, tuple(range(layers - 1)): 1, tuple(range(1, layers)): 1}
        )
    if architecture in MIXTURES:
        more["target_parameters"] = d.one(
            "experts", {("mlp.experts.gate_up_proj",): 1, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"): 1}
        )
    if architecture in ("Llama 2, Llama 3", "Mistral"):
        more["layer_replication"] = [[0, layers], [layers - 1, layers]]
    count = d.one("number of features", {0: 2, 1: 4, 2: 3, 3: 1})
    for name in d.of("features").sample(sorted(more), count):
        value = more[name]
        if name in ("lm_head", "embedding"):
            target = name if name == "lm_head" else embedding
            peft["target_modules"] = [*peft["target_modules"], target]
        else:
            peft[name] = list(value) if isinstance(value, tuple) else value
    return peft
