"""`draw`: the case of a seed.

Each feature is drawn by a generator of its own, so that a new feature leaves what the others draw for a seed as it was.
"""

from __future__ import annotations

import math
from typing import Any

from ..architectures import EAGER_ONLY
from .case import HALF, MIXTURES, Case, Draw
from .lora_fields import EMBEDDINGS, lora_fields

# Of tests/support/architectures.py; one that is added there is added here by hand, since it changes what seeds draw.
NAMES = (
    "Llama 2, Llama 3", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi", "GPT-2", "GPT-NeoX", "OPT", "BLOOM",
    "Falcon", "StableLM", "Granite", "Cohere", "OLMo 2", "SmolLM3", "Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS",
    "Mamba", "Mamba 2", "Qwen3-Next", "LLaVA (the text)",
)  # fmt: skip
# Logits with a soft cap, tied embeddings with Conv1D, and experts: what few have is drawn more often.
WEIGHTS = {"Gemma 2": 3, "GPT-2": 3, "Mixtral": 2, "Qwen3-MoE": 2, "Phi": 2, "Cohere": 2}
LONGEST = 18
NO_POSITIONS = {"BLOOM", "Mamba", "Mamba 2"}  # their forward takes no position_ids
RECURRENT = {"Mamba", "Mamba 2", "Qwen3-Next"}  # take no mask of pairs
# Told by the two arguments of AuxiliaryHeads.logits.
INSPECTED_LAYOUTS = {"plain", "mask of ones", "right", "left", "both sides", "left with positions", "packed"}
WITH_ROUTER_LOSS = {"Mixtral", "Qwen3-MoE", "GPT-OSS", "Qwen3-Next"}


def draw(seed: int) -> Case:
    """The case of a seed."""
    d = Draw(seed)
    architecture = d.one("architecture", {name: WEIGHTS.get(name, 1) for name in NAMES})
    attention = "eager" if architecture in EAGER_ONLY else d.one("attention", {"eager": 1, "sdpa": 2})
    precision = d.one("precision", {"fp32": 10} | dict.fromkeys(sorted(HALF), 1))
    method = d.one("method", {"lora": 3, "full": 1})
    layers = d.one("layers", {2: 2, 3: 1})
    micro_batches = d.one("micro_batches", {1: 3, 2: 3, 3: 1})
    schedule = d.one("schedule", dict.fromkeys(["constant", "reflected_sine", "sine", "linear", "linear_decay"], 1))
    total_steps = d.of("total_steps").randint(1, 12)
    trained = {"frozen": 3, "full": 2} if method == "full" else {"frozen": 4, "lora": 2, "full": 2}
    values = {
        "architecture": architecture,
        "attention": attention,
        "layers": layers,
        "tied": d.one("tied", {None: 3, True: 1, False: 1}),
        "router_loss": architecture in WITH_ROUTER_LOSS and d.chance("router_loss", 0.8),
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
        "fraction": d.one("fraction", {1.0: 3, 0.6: 2, 0.25: 1}),
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
        values["adapters"] = d.one("adapters", {"one": 6, "second inactive": 1, "second active": 2})
        values["peft"] = lora_fields(d, architecture, layers)
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
