"""`Concepts`: everything that ``peft-caft concepts`` finds."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from .density import Density, RecommendedN
from .head_knowledge import HeadKnowledge
from .losses import ModelComparison, ModelConcepts
from .settings import ConceptsSettings


@dataclass(frozen=True)
class Concepts:
    """What ``concepts.json`` holds."""

    unit: str
    unit_guessed: bool
    data: dict[str, Any]
    density: Density
    recommended: RecommendedN
    models: dict[str, ModelConcepts]
    comparisons: list[ModelComparison]
    unigram_entropy: float
    heads: list[HeadKnowledge]
    settings: ConceptsSettings
    provenance: dict[str, Any]

    def to_json(self) -> str:
        record = asdict(self)
        for name in ("multi_token_tokens", "continuing_tokens"):
            record["density"][name] = getattr(self.density, name)
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
