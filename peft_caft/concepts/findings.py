"""What `peft-caft concepts` is asked for, and what it finds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .density import Density, RecommendedN
from .head_knowledge import HeadKnowledge
from .losses import Comparison, ModelConcepts
from .settings import ConceptsSettings


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
