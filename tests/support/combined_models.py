"""A `Case` as a model with batches, one training step of it by the package, and the same by the naive reference.

The reference is given modules by their written-down names, documents and padding as they were drawn, and the schedule as
a formula: it asks nothing of the package but for the parameters of the heads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from peft_caft import AuxiliaryHeads, CAFTConfig, FullFineTuningConfig, prepare_full_fine_tuning
from peft_caft.heads.unembedding import CHUNK_SIZES, ChunkSize
from peft_caft.method.callback import objective_of

from ..reference import Parts, all_logits, cross_entropies
from .architectures import ARCHITECTURES, MIXTURE
from .random_combinations import Case
from .tiny_models import VOCABULARY

# Layers and final norm of those architectures that call them otherwise than Llama does.
NAMES = {
    "Phi": ("model.layers", "model.final_layernorm"),
    "GPT-2": ("transformer.h", "transformer.ln_f"),
    "GPT-NeoX": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "OPT": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "BLOOM": ("transformer.h", "transformer.ln_f"),
    "Falcon": ("transformer.h", "transformer.ln_f"),
    "Mamba": ("backbone.layers", "backbone.norm_f"),
    "Mamba 2": ("backbone.layers", "backbone.norm_f"),
    "LLaVA (the text)": ("model.language_model.layers", "model.language_model.norm"),
}
LLAMA_NAMES = ("model.layers", "model.norm")
SCHEDULES = {
    "reflected_sine": lambda done: math.cos(math.pi / 2 * done),
    "sine": lambda done: math.sin(math.pi / 2 * done),
    "linear": lambda done: done,
    "linear_decay": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
ROUTER_WEIGHT = 0.5
IMAGE_TOKEN, IMAGE_TOKENS = 96, 4  # of an image of 8 x 8 in patches of 4 x 4


@dataclass
class Batch:
    """One micro-batch. ``documents[b][t]`` is the number of the document, None for padding."""

    inputs: dict[str, Tensor]
    labels: Tensor
    documents: list[list[int | None]]


@dataclass
class Trained:
    """What a training step computed; losses of micro-batches in nats, gradients and metrics by name."""

    losses: list[float]
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    logits: list[Tensor] = field(default_factory=list)


class CombinedModel:
    """The model of a case, and its step by the package and by the reference."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        spoiled = dict([case.spoiled]) if case.spoiled else {}
        base = _base_model(case)
        layers, norm = NAMES.get(case.architecture, LLAMA_NAMES)
        self.parts = Parts(layers, base.get_submodule(norm), base.lm_head, _after_logits(case.architecture))
        if case.loss == "sft":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        self.final_norm = (case.head_input == "last_layer_input") != (case.head_files == "other norm")
        fields, self.heads_in_files = _objective_fields(case), []
        if case.head_files:
            self.heads_in_files = _heads_in_files(case, base, folder / f"heads-{case.seed}")
            fields["heads"] = str(folder / f"heads-{case.seed}")
        base.to(_dtype_of_base(case))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(not _is_frozen(base, name, parameter, case.frozen_base))
        if case.checkpointing and "later" not in case.checkpointing:
            _checkpoint(base, case)
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            if case.method == "full":
                fields["freeze_unembedding"] = case.freeze_unembedding
                self.model = prepare_full_fine_tuning(
                    base, FullFineTuningConfig(**fields | _own(spoiled, FullFineTuningConfig))
                )
            else:
                if "layers_to_transform" in spoiled:  # which names of modules go with, but no pattern
                    spoiled["target_modules"] = "all-linear"
                self.model = self._peft_model(base, {**fields, **case.peft} | _own(spoiled, CAFTConfig))
        if case.checkpointing and "later" in case.checkpointing:
            _checkpoint(base, case)
        self.model.train()
        self.base = base
        self.objective = objective_of(self.model)
        self._require_trained_parts(spoiled)
        if "inference_mode" not in spoiled:
            self._add_noise()
        unfrozen = {
            "": [],
            "final norm": self.parts.norm.named_parameters(),
            "lm_head": self.parts.lm_head.named_parameters(),
            "last layer": base.get_submodule(layers)[-1].named_parameters(),
        }
        for name, parameter in unfrozen[case.unfrozen_base]:
            parameter.requires_grad_(parameter.requires_grad or "lora_" not in name)

    def _require_trained_parts(self, spoiled: dict[str, Any]) -> None:
        """What trains is what the configuration says, and heads are those of the files."""
        case = self.case
        if "inference_mode" in spoiled:
            return
        for name, parameter in self.objective.heads_for_training().named_parameters():
            trained = case.train_heads == "full" or (case.train_heads == "lora" and "lora_" in name)
            assert parameter.requires_grad == trained, name
        in_files = [p for head in self.heads_in_files for p in head.parameters()]
        own = [p for head in self.heads for n, p in head.named_parameters() if "lora_" not in n]
        rounded = [p.to(_dtype_of_base(case)) for p in in_files]
        assert not in_files or all(torch.equal(p, q.to(p.dtype)) for p, q in zip(own, rounded, strict=True))
        if case.method == "full":
            lm_head = list(self.parts.lm_head.parameters())
            for name, parameter in self.base.named_parameters():
                frozen = _is_frozen(self.base, name, parameter, case.frozen_base)
                frozen |= case.freeze_unembedding and any(parameter is own for own in lm_head)
                assert "caft" in name or parameter.requires_grad != frozen, name

    def _peft_model(self, base: PreTrainedModel, fields: dict[str, Any]) -> PeftModel:
        case = self.case
        fp32_adapters = {"autocast_adapter_dtype": case.precision != "bf16"}
        model = get_peft_model(base, CAFTConfig(**fields), **fp32_adapters)
        if case.adapters != "one" or (case.spoiled and case.spoiled[0] == "two adapters"):
            other = {"head_type": "residual", "num_auxiliary_heads": 1, "aux_loss_weight": 9.0, "r": 3}
            names = ["second", "default"] if case.adapters == "second inactive" else ["default", "second"]
            if names[0] == "second":
                model.add_adapter(
                    "second", CAFTConfig(target_modules=case.peft["target_modules"], **other), **fp32_adapters
                )
            else:
                model.add_adapter("second", CAFTConfig(**fields), **fp32_adapters)
                model.set_adapter("second")
            if case.spoiled and case.spoiled[0] == "two adapters":
                model.base_model.set_adapter(["default", "second"])
        return model

    def _add_noise(self) -> None:
        """To what is trained and to heads, so that nothing is zero or equal to its neighbour."""
        generator = torch.Generator().manual_seed(self.case.seed + 1)
        for name, parameter in self.model.named_parameters():
            heads = "auxiliary_heads" in name
            if (heads and not self.case.head_files) or (parameter.requires_grad and self.case.method == "lora"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (0.1 if "lora_" in name or heads else 0.03) * noise.to(parameter.dtype)

    @property
    def heads(self) -> list[nn.Sequential]:
        return list(self.objective.heads_for_training().heads)

    def step(self) -> Trained:
        """By the package, as Trainer, TRL's SFTTrainer or a bare loop calls it."""
        case = self.case
        all_batches = batches(case)
        with _chunks(case.chunk_rows):
            self.prepares = True
            self._before(len(all_batches))
            self.prepares = False
            self._tell()
            self.objective.read_metrics()
            self.logits: list[Tensor] = []
            losses = []
            for batch in all_batches:
                loss = self._forward(batch, len(all_batches), count(all_batches))
                (loss * case.factor).backward()
                losses.append(float(loss.detach()))
            metrics = self.objective.read_metrics()
        gradients = _taken_gradients(self.model, case.factor)
        if case.inspected:
            for batch in all_batches:
                with _autocast(case):
                    self.logits += self.objective.heads_for_training().logits(self.model, **_without_cache(batch))
        return Trained(losses, gradients, metrics, self.logits)

    def _before(self, micro_batches: int) -> None:
        """What the model does before the step; what it keeps must not reach into it."""
        case = self.case
        if not case.before or case.told != "progress" or (case.spoiled and case.spoiled[0] != "labels"):
            return
        self._tell()
        others = batches(case, seed=case.seed + 7)
        match case.before:
            case "a step":
                for batch in others:
                    self._forward(batch, micro_batches, 5).backward()
                self.model.zero_grad()
                self._add_noise()  # the optimizer's
            case "an evaluation":
                self.model.eval()
                with torch.no_grad(), _autocast(case):
                    self.model(**others[0].inputs, labels=others[0].labels)
                self.model.train()
            case "a step that failed":
                last = self.base.get_submodule(self.parts.layers)[-1]
                hook = last.register_forward_hook(_fail)
                with pytest.raises(MemoryError):
                    self._forward(others[0], micro_batches, 5)
                hook.remove()

    def changed_parts(self) -> set[str]:
        """Names of norm and lm_head, of those where the adapted model computes something else than heads do."""
        seen: list[Tensor] = []
        last = self.base.get_submodule(self.parts.layers)[-1]
        hook = last.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        with torch.no_grad():
            inputs = {"use_cache": False} | batches(self.case)[0].inputs
            outputs = self.base(**inputs, output_hidden_states=True)
            states = outputs.hidden_states[-1]
            pairs = {
                NAMES.get(self.case.architecture, LLAMA_NAMES)[1]: (self.parts.norm(seen[0]), states),
                "lm_head": (self.parts.after(self.parts.lm_head(states)), outputs.logits),
            }
        hook.remove()
        differ = {name for name, (own, of_model) in pairs.items() if (own - of_model).norm() > 1e-4 * own.norm()}
        return {name.split(".")[-1] for name in differ}

    def _router_loss(self, batch: Batch) -> Tensor | float:
        """What a mixture of experts adds to its loss."""
        if not self.case.router_loss:
            return 0.0
        with _autocast(self.case):
            return ROUTER_WEIGHT * self.base(**{"use_cache": False} | batch.inputs).aux_loss

    def _tell(self) -> None:
        case = self.case
        if case.told == "progress" and not (case.spoiled and case.spoiled[0] == "untold schedule"):
            step = case.spoiled[1] if case.spoiled and case.spoiled[0] == "progress" else case.step
            self.objective.set_training_progress(step, case.total_steps)

    def _forward(self, batch: Batch, micro_batches: int, items: int) -> Tensor:
        case = self.case
        kwargs: dict[str, Any] = {**batch.inputs, "labels": batch.labels}
        if case.counted:
            kwargs["num_items_in_batch"] = torch.tensor(items) if case.counted == "tensor" else items
        match case.loss:
            case "sft":
                kwargs["fused_lm_head"] = True
            case "logits":
                kwargs["logits_to_keep"] = 0
            case "tuple":
                kwargs["return_dict"] = False
        if case.spoiled and case.spoiled[0] == "shift_labels":
            kwargs["shift_labels"] = batch.labels
        if case.spoiled and case.spoiled[0] == "labels" and not self.prepares:
            kwargs["labels"] = {
                "more tokens": torch.cat([batch.labels, batch.labels], dim=1),
                "fewer tokens": batch.labels[:, : case.tokens // 2],
                "fewer rows": batch.labels[: case.rows - 1],
                "one dimension": batch.labels.flatten(),
            }[case.spoiled[1]]
        args = []
        if case.positional:
            names = list(inspect.signature(self.model.forward).parameters)
            args = [kwargs.pop(name, None) for name in names[: names.index("labels") + 1]]
        if case.hidden_states:
            kwargs["output_hidden_states"] = True
        with _autocast(case):
            outputs = self.model(*args, **kwargs)
            if case.loss == "sft":  # as SFTTrainer.compute_loss (trl 1.16) does
                number = kwargs.get("num_items_in_batch", outputs.label_mask.sum())
                loss = -outputs.log_probs.sum() / torch.as_tensor(number).clamp(min=1)
                return loss + ROUTER_WEIGHT * outputs.aux_loss if case.router_loss else loss
        if case.loss == "tuple":
            return outputs[0]
        if case.loss == "logits":
            self.logits = [*getattr(self, "logits", []), outputs.logits.detach()]
        return outputs.loss

    def reference_step(self) -> Trained:
        """By the equation."""
        case = self.case
        self.model.zero_grad()
        self.base.gradient_checkpointing_disable()
        all_batches = batches(case)
        losses, sums, counts, supervised = [], [], [], 0
        own_logits: list[Tensor] = []
        heads_logits: list[Tensor] = []
        for index, batch in enumerate(all_batches):
            own_targets = int((batch.labels[:, 1:] != -100).sum())
            divisor = count(all_batches) if case.counted else own_targets
            if case.beta > 0 or case.loss == "sft":  # else the loss is plain LoRA's, which is NaN without targets
                divisor = max(1, divisor)
            step = case.step if case.told == "progress" else index
            gamma = SCHEDULES[case.schedule](min(step / case.total_steps, 1))
            mask, targets = _allowed(case, batch, step, index + 1)
            with _autocast(case):
                logits = all_logits(
                    self.base, self.heads, case.head_input, self.parts, self.final_norm, **batch.inputs
                )  # fmt: skip
                own, *of_heads = cross_entropies(logits, batch.labels, mask)
            self.heads_train = any(one.requires_grad for one in of_heads)
            loss = value = own / divisor
            if own_targets or case.counted or case.loss == "sft":  # where plain LoRA's loss is NaN, CAFT's is 0
                loss = value = value + self._router_loss(batch)
            for k, cross_entropy in enumerate(of_heads, start=2):
                weight = case.beta * gamma * case.alpha ** (k - 1) / case.fraction
                loss = loss + weight * cross_entropy / divisor
            (loss * case.factor).backward()
            # In log-probabilities the auxiliary loss has a gradient, but no value.
            losses.append(float((value if case.loss == "sft" else loss).detach()))
            sums.append([float(one.detach()) / case.fraction for one in of_heads])
            counts.append(targets)
            supervised += own_targets
            if case.loss == "logits":
                own_logits.append(logits[0].detach())
            heads_logits += [one.detach() for one in logits[1]]
        metrics = _metrics(case, sums, counts, supervised) | {"gamma": gamma}
        logits_seen = own_logits + (heads_logits if case.inspected else [])
        return Trained(losses, _taken_gradients(self.model, case.factor), metrics, logits_seen)


def _without_cache(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.inputs.items() if name != "use_cache"}


def count(all_batches: list[Batch]) -> int:
    """What Trainer passes as num_items_in_batch."""
    return max(1, sum(int((batch.labels[:, 1:] != -100).sum()) for batch in all_batches))


def _base_model(case: Case) -> PreTrainedModel:
    config = ARCHITECTURES[case.architecture]()
    text = config.get_text_config()
    text.num_hidden_layers = case.layers
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[-case.layers :]
    if case.tied is not None:
        config.tie_word_embeddings = text.tie_word_embeddings = case.tied
    if case.router_loss:
        text.output_router_logits, text.router_aux_loss_coef = True, ROUTER_WEIGHT
    if case.precision != "fp32" and hasattr(text, "num_experts_per_tok"):
        # The choice of an expert may hang on a rounding error.
        text.num_experts_per_tok = MIXTURE["num_local_experts"]
        text.topk_group = vars(text).get("n_group")
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        model = auto.from_config(config, attn_implementation=case.attention)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def _after_logits(architecture: str) -> Callable[[Tensor], Tensor]:
    match architecture:
        case "Gemma 2":
            return lambda logits: 3.0 * torch.tanh(logits / 3.0)
        case "Cohere":
            return lambda logits: logits * 0.3
        case "Granite":
            return lambda logits: logits / 3.0
    return lambda logits: logits


def _dtype_of_base(case: Case) -> torch.dtype:
    if case.precision in ("fp32", "bf16 autocast", "fp16 autocast"):
        return torch.float32
    return torch.float16 if case.precision == "fp16 base" else torch.bfloat16


def _autocast(case: Case) -> AbstractContextManager:
    if "autocast" not in case.precision:
        return nullcontext()
    return torch.autocast("cpu", torch.float16 if case.precision.startswith("fp16") else torch.bfloat16)


def _objective_fields(case: Case) -> dict[str, Any]:
    told = case.told == "total_steps"
    return {
        "num_auxiliary_heads": case.heads,
        "head_type": case.head_type,
        "head_input": case.head_input,
        "head_num_layers": case.head_layers,
        "train_heads": case.train_heads,
        "aux_loss_weight": case.beta,
        "aux_loss_decay": case.alpha,
        "aux_loss_schedule": case.schedule,
        "aux_token_fraction": case.fraction,
        "total_steps": case.total_steps if told else None,
    }


def _own(spoiled: dict[str, Any], config: type) -> dict[str, Any]:
    return {name: value for name, value in spoiled.items() if name in config.__dataclass_fields__}


def _heads_in_files(case: Case, base: PreTrainedModel, folder: Path) -> list[nn.Module]:
    """Writes heads, and returns those that the case takes."""
    more = 2 if case.head_files == "more heads" else 0
    heads = AuxiliaryHeads.from_base_model(
        base, case.heads + more, case.head_type, case.head_input, case.head_layers, case.head_files == "with bias"
    )
    if case.head_files == "other norm":
        heads.config.final_norm = not heads.config.final_norm
    generator = torch.Generator().manual_seed(case.seed + 2)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    heads.save_pretrained(folder)
    return list(heads.heads)[: case.heads]


def _is_frozen(base: PreTrainedModel, name: str, parameter: Tensor, what: str) -> bool:
    """Whether it is one of the parameters that the user of a case has frozen."""
    if what == "embeddings":
        return parameter is base.get_input_embeddings().weight
    return (what == "norms" and ("norm" in name or "ln_" in name)) or (what == "biases" and name.endswith("bias"))


def _checkpoint(base: PreTrainedModel, case: Case) -> None:
    reentrant = case.checkpointing.startswith("reentrant")
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # else no gradient goes through layers whose parameters are frozen
        base.enable_input_require_grads()


def batches(case: Case, seed: int | None = None) -> list[Batch]:
    return [_batch(case, (case.seed if seed is None else seed) * 10 + index) for index in range(case.micro_batches)]


def _batch(case: Case, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows, tokens = case.rows, case.tokens
    ids = torch.randint(1, 95, (rows, tokens), generator=generator)
    documents: list[list[int | None]] = [[0] * tokens for _ in range(rows)]
    inputs: dict[str, Tensor] = {}
    if case.layout.startswith("packed") or case.layout == "one row of positions":
        rows_of_positions = []
        for row in range(rows):
            lengths: list[int] = []
            while sum(lengths) < tokens:
                lengths.append(min(number(1, max(2, tokens * 2 // 3)), tokens - sum(lengths)))
            if case.layout == "one row of positions" and row:
                documents[row] = list(documents[0])
                continue
            documents[row] = [index for index, length in enumerate(lengths) for _ in range(length)]
            rows_of_positions.append([t for length in lengths for t in range(length)])
        inputs["position_ids"] = torch.tensor(rows_of_positions)
        inputs["use_cache"] = False  # with a cache transformers does not look for documents
    numbers = torch.tensor([[0 if document is None else document for document in row] for row in documents])
    if case.layout == "packed with mask":  # of which transformers makes one document
        inputs["attention_mask"] = torch.ones_like(ids)
    elif case.layout == "packed, numbers in mask":
        inputs["attention_mask"] = numbers + 1
    elif case.layout == "packed, seq_idx":
        inputs["seq_idx"] = numbers.int()
    elif case.layout == "packed, cu_seq_lens":
        begins = documents_begin(documents).flatten().nonzero()[:, 0].tolist()
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([*begins, rows * tokens]).int())
    elif case.layout == "packed, mask of pairs":
        pairs = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
        lowest = torch.finfo(_dtype_of_base(case)).min
        added = torch.zeros(pairs.shape, dtype=_dtype_of_base(case)).masked_fill(~pairs, lowest)
        inputs["attention_mask"] = pairs if case.attention == "sdpa" else added
    if case.layout in ("packed, seq_idx", "packed, cu_seq_lens", "packed, numbers in mask") and number(0, 1):
        del inputs["position_ids"]
    if case.layout in ("mask of ones", "right", "left", "both sides", "left with positions"):
        mask = torch.ones_like(ids)
        for row in range(rows):
            left = number(0, tokens - 1) if case.layout in ("left", "left with positions", "both sides") else 0
            right = number(0, tokens - 1 - left) if case.layout in ("right", "both sides") else 0
            mask[row, :left] = 0
            mask[row, tokens - right :] = 0
            documents[row] = [0 if mask[row, t] else None for t in range(tokens)]
        inputs["attention_mask"] = mask
        if case.layout == "left with positions":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if case.images:
        ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator).to(_dtype_of_base(case))
    labels = _labels(case, ids, documents, generator)
    if case.embedded:
        width = 32
        embeddings = torch.randn(rows, tokens, width, generator=generator).to(_dtype_of_base(case))
        # As enable_input_require_grads does it for embeddings that the model looks up.
        inputs["inputs_embeds"] = embeddings.requires_grad_(case.checkpointing.startswith("reentrant"))
    else:
        inputs["input_ids"] = ids
    return Batch(inputs, labels, documents)


def _labels(case: Case, ids: Tensor, documents: list[list[int | None]], generator: torch.Generator) -> Tensor:
    labels, rows, tokens = ids.clone(), *ids.shape

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    match case.labels:
        case "prompt":
            for row in range(rows):
                labels[row, : number(0, tokens)] = -100
        case "gaps":
            labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        case "other tokens":
            labels = torch.randint(1, 95, labels.shape, generator=generator)
        case "one row without":
            labels[number(0, rows - 1)] = -100
        case "one token":
            for row in range(rows):
                kept = number(0, tokens - 1)
                labels[row, :kept] = -100
                labels[row, kept + 1 :] = -100
        case "none":
            labels[:] = -100
    labels[labels == IMAGE_TOKEN] = -100
    if case.labels != "padding too":
        padding = torch.tensor([[document is None for document in row] for row in documents])
        labels[padding] = -100
    if case.layout.startswith("packed") and number(0, 1):  # as padding-free collators do
        labels[documents_begin(documents)] = -100
    return labels


def documents_begin(documents: list[list[int | None]]) -> Tensor:
    """Where a document begins, bool ``(batch, tokens)``."""
    return torch.tensor([[t == 0 or row[t] != row[t - 1] for t in range(len(row))] for row in documents])


def _allowed(case: Case, batch: Batch, step: int, forward: int) -> tuple[Tensor, list[int]]:
    """Where head k may have a target, bool ``(n + 1, batch, tokens)``, and how many there are before the draw."""
    rows, tokens = batch.labels.shape
    mask = torch.zeros(case.heads + 2, rows, tokens, dtype=torch.bool)
    drawn = torch.ones(rows * tokens, dtype=torch.bool)
    if case.fraction < 1:  # new in each forward pass, and the same after a resume
        seed = step * 1_000_003 + forward
        drawn = torch.rand(rows * tokens, generator=torch.Generator().manual_seed(seed)) < case.fraction
    counts = []
    for k in range(2, case.heads + 2):
        counts.append(0)
        for b in range(rows):
            for t in range(tokens - k):
                here, there = batch.documents[b][t], batch.documents[b][t + k]
                if here is not None and here == there:
                    mask[k, b, t] = drawn[b * tokens + t]
                    counts[-1] += int(batch.labels[b, t + k] != -100)
    return mask, counts


def _metrics(case: Case, sums: list[list[float]], counts: list[list[int]], supervised: int) -> dict[str, float]:
    if case.beta == 0 or not supervised:
        return {}
    totals = [sum(values) for values in zip(*sums, strict=True)]
    numbers = [sum(values) for values in zip(*counts, strict=True)]
    weighted = sum(case.alpha ** (k - 1) * total for k, total in enumerate(totals, start=2))
    means = {f"loss_head_{k}": s / n for k, (s, n) in enumerate(zip(totals, numbers, strict=True), start=2) if n}
    return {"aux_loss": weighted / supervised, **means}


def _taken_gradients(model: nn.Module, factor: float) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / factor
        else:
            assert parameter.grad is None, name
    return found


def _fail(*_: Any) -> None:
    raise MemoryError


@contextmanager
def _chunks(rows: int | None) -> Iterator[None]:
    """As many rows at a time as large vocabularies leave room for."""
    before = CHUNK_SIZES["cpu"]
    if rows is not None:
        CHUNK_SIZES["cpu"] = ChunkSize(rows * VOCABULARY)
    try:
        yield
    finally:
        CHUNK_SIZES["cpu"] = before
