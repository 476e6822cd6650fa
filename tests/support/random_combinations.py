"""Random combinations of what a user may combine: an integer gives a `Case`, a readable description of one training step.

Each feature is drawn by a generator of its own, so that a new feature leaves what the others draw for a seed as it was.
`tests/support/combined_models.py` makes models and batches of a case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from random import Random
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from . import architectures
from .architectures import EAGER_ONLY

# Of tests/support/architectures.py; one that is added there is added here by hand, since it changes what seeds draw.
NAMES = (
    "Llama 2, Llama 3", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi", "GPT-2", "GPT-NeoX", "OPT", "BLOOM",
    "Falcon", "StableLM", "Granite", "Cohere", "OLMo 2", "SmolLM3", "Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS",
    "Mamba", "Mamba 2", "Qwen3-Next", "LLaVA (the text)",
)  # fmt: skip
LONGEST = 18
NO_POSITIONS = {"BLOOM", "Mamba", "Mamba 2"}  # their forward takes no position_ids
RECURRENT = {"Mamba", "Mamba 2", "Qwen3-Next"}  # take no mask of pairs
# Told by the two arguments of AuxiliaryHeads.logits.
INSPECTED_LAYOUTS = {"plain", "mask of ones", "right", "left", "both sides", "left with positions", "packed"}
MIXTURES = {"Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS", "Qwen3-Next"}
WITH_ROUTER_LOSS = {"Mixtral", "Qwen3-MoE", "GPT-OSS", "Qwen3-Next"}
HALF = {"bf16 base", "fp16 base", "bf16", "bf16 autocast", "bf16 base, bf16 autocast", "fp16 autocast"}


@dataclass(frozen=True)
class Case:
    """One optimizer step of one model. ``str`` leaves out what has its default."""

    seed: int
    architecture: str = "Llama 2, Llama 3"
    attention: str = "eager"
    layers: int = 2
    tied: bool | None = None  # None: as the architecture has it
    router_loss: bool = False
    method: str = "lora"
    peft: dict[str, Any] = field(default_factory=dict)
    adapters: str = "one"
    freeze_unembedding: bool = False
    frozen_base: str = ""  # parameters that full fine-tuning leaves out
    unfrozen_base: str = ""  # parameters that train beside adapters
    heads: int = 2
    head_type: str = "decoder_layer"
    head_input: str = "last_layer_input"
    head_layers: int = 1
    head_files: str = ""  # how the heads in a folder differ from fresh ones
    train_heads: str = "frozen"
    precision: str = "fp32"
    checkpointing: str = ""
    beta: float = 0.7
    alpha: float = 0.8
    fraction: float = 1.0
    schedule: str = "constant"
    step: int = 3
    total_steps: int = 10
    told: str = "progress"  # or "total_steps" in the configuration
    rows: int = 2
    tokens: int = 12
    layout: str = "plain"
    embedded: bool = False  # inputs_embeds in place of input_ids
    labels: str = "all"
    micro_batches: int = 1
    counted: str = ""  # type of num_items_in_batch
    loss: str = "trainer"
    factor: float = 1.0  # on the loss, as of a gradient scaler
    before: str = ""  # what the model did before the step
    positional: bool = False
    images: bool = False
    hidden_states: bool = False  # asked for by the caller
    chunk_rows: int | None = None  # whose logits are computed together
    inspected: bool = False  # by AuxiliaryHeads.logits, after the step
    spoiled: tuple[str, Any] | None = None

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in given.items() if value != getattr(PLAIN, name)}
        return ", ".join(f"{name}={value!r}" for name, value in {"seed": self.seed, **changed}.items())


PLAIN = Case(seed=-1)


class Draw:
    """Draws from a seed, each by the name of what is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of(self, name: str) -> Random:
        return Random(f"{self.seed} {name}")

    def chance(self, name: str, probability: float) -> bool:
        return self.of(name).random() < probability

    def one(self, name: str, weights: Mapping[Any, float]) -> Any:
        return self.of(name).choices(list(weights), list(weights.values()))[0]


def draw(seed: int) -> Case:
    """The case of a seed."""
    d = Draw(seed)
    # The plain ones are often right where a peculiar one is not, and quick.
    architecture = d.one("architecture", {name: 3 if name in ("GPT-2", "Gemma 2") else 1 for name in NAMES})
    attention = "eager" if architecture in EAGER_ONLY else d.one("attention", {"eager": 1, "sdpa": 2})
    precision = d.one("precision", {"fp32": 10} | dict.fromkeys(sorted(HALF), 1))
    method = d.one("method", {"lora": 3, "full": 1})
    layers = d.one("layers", {2: 2, 3: 1})
    micro_batches = d.one("micro_batches", {1: 4, 2: 2, 3: 1})
    schedule = d.one("schedule", dict.fromkeys(["constant", "reflected_sine", "sine", "linear", "linear_decay"], 1))
    total_steps = d.of("total_steps").randint(1, 12)
    trained = {"frozen": 3, "full": 2} if method == "full" else {"frozen": 4, "lora": 2, "full": 2}
    values = {
        "architecture": architecture,
        "attention": attention,
        "layers": layers,
        "tied": d.one("tied", {None: 3, True: 1, False: 1}),
        "router_loss": architecture in WITH_ROUTER_LOSS and d.chance("router_loss", 0.4),
        "method": method,
        "heads": d.one("heads", {1: 2, 2: 4, 3: 2, 5: 1}),
        "head_type": d.one("head_type", {"residual": 2, "decoder_layer": 3}),
        "head_input": d.one("head_input", {"last_layer_input": 3, "last_hidden_state": 1}),
        "head_layers": d.one("head_layers", {1: 4, 2: 1}),
        "train_heads": d.one("train_heads", trained),
        "precision": precision,
        "checkpointing": d.one("checkpointing", {"": 5, "reentrant": 1, "non-reentrant": 1, "reentrant, later": 1, "non-reentrant, later": 1}),
        "beta": d.one("beta", {0.7: 4, 1.0: 2, 3.0: 1, 0.05: 1, 0.0: 0.2}),
        "alpha": d.one("alpha", {0.8: 3, 1.0: 1, 0.5: 1}),
        "fraction": d.one("fraction", {1.0: 3, 0.6: 1, 0.25: 0.5}),
        "schedule": schedule,
        "total_steps": total_steps,
        "step": d.of("step").randint(0, total_steps + 1),
        "told": d.one("told", {"progress": 4, "total_steps": 1}),
        "rows": d.one("rows", {1: 1, 2: 3, 3: 1}),
        "tokens": d.of("tokens").choice([*range(1, 7), *range(8, LONGEST + 1), *range(8, LONGEST + 1)]),
        "layout": _layout(d, architecture),
        "embedded": d.chance("embedded", 0.06),
        "labels": d.one("labels", {"all": 3, "prompt": 4, "gaps": 2, "other tokens": 1, "one row without": 1, "one token": 1, "none": 0.4, "padding too": 0.5}),
        "micro_batches": micro_batches,
        "counted": d.one("counted", {"": 1, "int": 1, "tensor": 2}),
        "loss": d.one("loss", {"trainer": 5, "sft": 2, "logits": 1, "tuple": 1}),
        "factor": d.one("factor", {1.0: 2, 0.25: 1, 1024.0: 1}),
        "before": d.one("before", {"": 5, "a step": 3, "an evaluation": 1, "a step that failed": 1}),
        "positional": d.chance("positional", 0.1),
        "images": architecture.startswith("LLaVA") and d.chance("images", 0.6),
        "hidden_states": d.chance("hidden_states", 0.1),
        "inspected": d.chance("inspected", 0.2),
        "chunk_rows": d.one("chunk_rows", {None: 2, 5: 1, 1: 0.3}),
    }  # fmt: skip
    if d.chance("head_files", 0.2):
        values["head_files"] = _head_files(d, values)
    if method == "full":
        values["freeze_unembedding"] = d.chance("freeze_unembedding", 0.3)
        values["frozen_base"] = d.one("frozen_base", {"": 4, "embeddings": 1, "norms": 1, "biases": 1})
    else:
        values["adapters"] = d.one("adapters", {"one": 8, "second inactive": 1, "second active": 1})
        values["peft"] = _peft(d, architecture, layers)
        values["unfrozen_base"] = d.one("unfrozen_base", {"": 9, "final norm": 1, "lm_head": 1, "last layer": 1})
    if d.chance("spoiled", 0.08):
        values["spoiled"] = _spoiled(d, method)
    return Case(seed=seed, **_possible(values))


def _layout(d: Draw, architecture: str) -> str:
    masks = {"plain": 3, "mask of ones": 1, "right": 3, "left": 3, "both sides": 0.5}
    positions = {"left with positions": 1, "packed": 5, "packed with mask": 1, "one row of positions": 0.5,
                 "packed, numbers in mask": 0.5, "packed, seq_idx": 0.5, "packed, cu_seq_lens": 1}  # fmt: skip
    if architecture not in RECURRENT:
        positions["packed, mask of pairs"] = 1
    return d.one("layout", masks | ({} if architecture in NO_POSITIONS else positions))


def _head_files(d: Draw, values: dict[str, Any]) -> str:
    kinds = {"the same": 2, "more heads": 2, "other norm": 1}
    if values["head_type"] == "residual":
        kinds["with bias"] = 2
    return d.one("head_files kind", kinds)


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
INNER_NORMS = {"GPT-2": "ln_1", "OPT": "self_attn_layer_norm", "OLMo 2": "post_attention_layernorm",
               "Mamba": "norm", "Mamba 2": "norm"}  # fmt: skip


def _peft(d: Draw, architecture: str, layers: int) -> dict[str, Any]:
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


SPOILED_FIELDS: list[tuple[str, Any]] = [
    ("num_auxiliary_heads", 0),
    ("head_num_layers", 0),
    ("aux_loss_weight", -0.5),
    ("aux_loss_weight", math.inf),
    ("aux_loss_decay", 0.0),
    ("aux_loss_decay", 1.5),
    ("aux_token_fraction", 0.0),
    ("aux_token_fraction", 1.5),
    ("aux_loss_schedule", "cosine"),
    ("head_type", "linear"),
    ("head_input", "embeddings"),
    ("train_heads", "all"),
    ("total_steps", 0),
    # What is given to the model rather than to its configuration.
    ("progress", -1),
    ("untold schedule", None),
    ("shift_labels", None),
    ("labels", "more tokens"),
    ("labels", "fewer tokens"),
    ("labels", "fewer rows"),
    ("labels", "one dimension"),
]
SPOILED_LORA: list[tuple[str, Any]] = [
    ("r", 0),
    ("task_type", "SEQ_CLS"),
    ("target_modules", ["nothing"]),
    ("bias", "some"),
    ("layers_to_transform", 0),
    ("inference_mode", True),
    ("two adapters", None),
]


def _spoiled(d: Draw, method: str) -> tuple[str, Any]:
    return d.of("spoiled field").choice(
        SPOILED_FIELDS + (SPOILED_LORA if method == "lora" else [("train_heads", "lora")])
    )


def _possible(values: dict[str, Any]) -> dict[str, Any]:
    """Without combinations in which transformers, PEFT or TRL alone compute something else, or fail without a name."""
    peft = dict(values.get("peft", {}))
    architecture = values["architecture"]
    # trl 1.16, add_fused_lm_head reads the lm_head's weight and bias alone: not LoRA on it, nor new rows of a tied one.
    if "lm_head" in peft.get("target_modules", []) or "trainable_token_indices" in peft:
        values["loss"] = "trainer" if values["loss"] == "sft" else values["loss"]
    if values["loss"] == "sft":
        values["positional"] = False  # its model takes labels by name
    if values["embedded"] or values["images"] or values["layout"] not in INSPECTED_LAYOUTS:
        values["inspected"] = False
    if values["images"]:
        values |= {"embedded": False, "tokens": max(values["tokens"], 7)}
    if values["precision"].startswith("fp16"):
        values["factor"] = min(16.0, values["factor"] * 16)  # tiny models reach the ends of its range
    if values.get("unfrozen_base") == "lm_head":
        values["inspected"] = (
            False  # by then it is another lm_head than that of the heads' record, which logits refuses
        )
    if values["checkpointing"].startswith("reentrant"):
        values["router_loss"] = False  # transformers 5.23 records router logits inside the checkpoint: no gradient
    if architecture == "GPT-2" and peft.get("init_lora_weights") == "olora":
        del peft["init_lora_weights"]  # peft 0.21: olora_init does not transpose a Conv1D
    if architecture in MIXTURES and peft.get("init_lora_weights") in ("olora", "pissa", "orthogonal"):
        del peft["init_lora_weights"]  # peft 0.21: ParamWrapper.update_layer looks for a weight of all experts
    saved = {name.split(".")[-1] for name in peft.get("modules_to_save", [])}
    if saved & {"lm_head", EMBEDDINGS.get(architecture, "embed_tokens")}:
        peft.pop("trainable_token_indices", None)  # peft 0.21 wraps what it has wrapped: AttributeError
    if values["layout"] == "packed, mask of pairs":
        values["router_loss"] = False  # transformers 5.23: load_balancing_loss_func takes a mask of tokens alone
    spoiled = values.get("spoiled", ("",))[0]
    if spoiled in ("untold schedule", "progress"):
        values |= {"told": "progress", "schedule": "linear"}
    if spoiled == "labels":
        values |= {"tokens": max(4, values["tokens"]), "rows": max(2, values["rows"]), "told": "progress"}
    values["peft"] = peft
    return values


def may_be_refused(case: Case) -> list[str]:
    """Patterns of messages that name what a case combines and PEFT does not; empty if it must be trained."""
    peft, patterns = case.peft, []
    init = peft.get("init_lora_weights", True)
    embedding = EMBEDDINGS.get(case.architecture, "embed_tokens") in peft.get("target_modules", [])
    others = peft.get("use_dora") or init is not True or embedding or case.architecture in MIXTURES
    if peft.get("lora_bias") and others:
        patterns.append("lora_bias")
    if peft.get("use_dora") and case.architecture in MIXTURES:
        patterns.append("use_dora")
    if case.adapters != "one" and case.architecture in MIXTURES:
        patterns.append("target_parameters")
    if "bias" in peft and (case.adapters != "one" or (case.spoiled and case.spoiled[0] == "two adapters")):
        patterns.append("bias")
    if init == "orthogonal":
        patterns.append("Orthogonal initialization requires the LoRA rank to be even")
    if "exclude_modules" in peft:
        patterns.append("target_modules")
    if "trainable_token_indices" in peft:  # beside modules_to_save or LoRA for the same embedding
        patterns += ["trainable_token_indices", "TrainableTokensLayer"]
    if case.architecture == "Qwen3-Next" and case.layout in ("packed, cu_seq_lens", "packed, seq_idx"):
        patterns.append("packed sequences")  # without flash-linear-attention
    if case.architecture in MIXTURES:
        patterns.append("Cannot convert PEFT target")
    return patterns
