"""One training step of a `CombinedModel` by the package, and the same by the naive reference.

The reference is given modules by their written-down names, documents and padding as they were drawn, and the schedule as
a formula: it asks nothing of the package but for the parameters of the heads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_caft.heads.unembedding import CHUNK_SIZES, ChunkSize

from ...reference import all_logits, cross_entropies
from ..tiny_models import VOCABULARY
from .batches import Batch, allowed, batches, items_in
from .case import Case
from .model import LLAMA_NAMES, NAMES, ROUTER_WEIGHT, CombinedModel

SCHEDULES = {
    "reflected_sine": lambda done: math.cos(math.pi / 2 * done),
    "sine": lambda done: math.sin(math.pi / 2 * done),
    "linear": lambda done: done,
    "linear_decay": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@dataclass
class Trained:
    """What a training step computed; losses of micro-batches in nats, gradients and metrics by name."""

    losses: list[float]
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    logits: list[Tensor] = field(default_factory=list)


class Step:
    """A training step of the model of a case, by the package and by the reference."""

    def __init__(self, model: CombinedModel) -> None:
        self.of, self.case, self.model, self.base, self.objective = (
            model,
            model.case,
            model.model,
            model.base,
            model.objective,
        )
        self.heads_train = False  # whether any parameter gets a gradient through the heads; known after `by_reference`

    def by_package(self) -> Trained:
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
                loss = self._forward(batch, len(all_batches), items_in(all_batches))
                (loss * case.factor).backward()
                losses.append(float(loss.detach()))
            metrics = self.objective.read_metrics()
        gradients = _taken_gradients(self.model, case.factor)
        if case.inspected:
            for batch in all_batches:
                with _autocast(case):
                    self.logits += self.of.trained_heads.logits(self.model, **_without_cache(batch))
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
                self.of.add_noise()  # the optimizer's
            case "an evaluation":
                self.model.eval()
                with torch.no_grad(), _autocast(case):
                    self.model(**others[0].inputs, labels=others[0].labels)
                self.model.train()
            case "a step that failed":
                last = self.base.get_submodule(self.of.parts.layers)[-1]
                hook = last.register_forward_hook(_fail)
                with pytest.raises(MemoryError):
                    self._forward(others[0], micro_batches, 5)
                hook.remove()

    def changed_parts(self) -> set[str]:
        """Names of norm and lm_head, of those where the adapted model computes something else than heads do."""
        seen: list[Tensor] = []
        last = self.base.get_submodule(self.of.parts.layers)[-1]
        hook = last.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        with torch.no_grad():
            inputs = {"use_cache": False} | batches(self.case)[0].inputs
            outputs = self.base(**inputs, output_hidden_states=True)
            states = outputs.hidden_states[-1]
            pairs = {
                NAMES.get(self.case.architecture, LLAMA_NAMES)[1]: (self.of.parts.norm(seen[0]), states),
                "lm_head": (self.of.parts.after(self.of.parts.lm_head(states)), outputs.logits),
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

    def by_reference(self) -> Trained:
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
            divisor = items_in(all_batches) if case.counted else own_targets
            if case.beta > 0 or case.loss == "sft":  # else the loss is plain LoRA's, which is NaN without targets
                divisor = max(1, divisor)
            step = case.step if case.told == "progress" else index
            gamma = SCHEDULES[case.schedule](min(step / case.total_steps, 1))
            mask, targets = allowed(case, batch, step, index + 1)
            with _autocast(case):
                logits = all_logits(
                    self.base, self.of.heads, case.head_input, self.of.parts, self.of.final_norm, **batch.inputs
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


def _autocast(case: Case) -> AbstractContextManager:
    if "autocast" not in case.precision:
        return nullcontext()
    return torch.autocast("cpu", torch.float16 if case.precision.startswith("fp16") else torch.bfloat16)


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
