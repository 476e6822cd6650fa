"""What `peft-caft concepts` is asked for, and what it finds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..basics.checks import require_choice
from .density import Density, RecommendedN
from .head_knowledge import HeadKnowledge
from .losses import Comparison, ModelConcepts
from .terms import UNITS

BASE = "base"


@dataclass(frozen=True)
class ConceptsSettings:
    """What `concepts` is asked for; see `peft-caft concepts --help`.

    Attributes:
        adapter: ``NAME=FOLDER`` of LoRA or CAFT adapters, or of whole models with the same tokenizer. A name that comes several times
            is one model in several runs, such as seeds.
        loss: score the model; without, its tokenizer is enough.
    """

    data: str
    model: str
    output: str
    unit: str = "auto"
    adapter: list[str] = field(default_factory=list)
    heads: str | None = None
    loss: bool = True
    plots: bool = True
    max_rows: int | None = None
    max_length: int = 512
    batch_size: int = 8
    dtype: str = "auto"
    examples: int = 12
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("unit", self.unit, ("auto", *UNITS))
        for name in ("max_rows", "max_length", "batch_size", "resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1.")
        if self.examples < 0:
            raise ValueError(f"examples: got {self.examples}, expected at least 0.")
        if not self.loss and (self.adapter or self.heads):
            given = "adapter" if self.adapter else "heads"
            raise ValueError(
                f"{given}: given with --no-loss, which reads no weights, expected one or the other. Leave --no-loss out to score "
                f"the {given}."
            )
        _ = self.adapters

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Name -> folders or Hub ids of its runs, in the order given."""
        found: dict[str, list[str]] = {}
        for given in self.adapter:
            name, separator, source = given.partition("=")
            if not separator or not name.strip() or not source:
                raise ValueError(f"adapter: got {given!r}, expected NAME=FOLDER, such as LoRA=runs/lora.")
            if name.strip() == BASE:
                raise ValueError(f"adapter: got the name {BASE!r}, which is the base model's, expected another one.")
            found.setdefault(name.strip(), []).append(source)
        if len({len(sources) for sources in found.values()}) > 1:
            counts = ", ".join(f"{len(sources)} of {name!r}" for name, sources in found.items())
            raise ValueError(
                f"adapter: got {counts}, expected as many runs of each, since they are compared in pairs."
            )
        return found


@dataclass(frozen=True)
class Concepts:
    """Everything that was found; what is written as ``concepts.json``."""

    unit: str
    unit_guessed: bool
    data: dict[str, Any]
    density: Density
    recommended: RecommendedN
    models: dict[str, ModelConcepts]
    comparisons: list[Comparison]
    unigram_entropy: float
    heads: list[HeadKnowledge]
    settings: ConceptsSettings
    provenance: dict[str, Any]

    def to_json(self) -> str:
        record = asdict(self)
        found = record["density"]
        found |= {
            "multi_token_tokens": self.density.multi_token_tokens,
            "continuing_tokens": self.density.continuing_tokens,
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
