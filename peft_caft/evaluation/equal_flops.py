"""How many steps of LoRA cost as much as one step of CAFT, for given rows and heads."""

from pathlib import Path
from typing import Any

from ..basics.adapters import tokenizer_of, whole_model
from ..planning.flops import ModelShapes, caft_step, lora_step
from ..training.data import EncodedData, encode, read_jsonl
from ..training.fine_tuning import prepare
from ..training.settings import FineTuningSettings
from .comparison_plan import Arm, ComparisonPlan


def equal_flops(plan: ComparisonPlan, arm: Arm, train: Path) -> float:
    """Operations per token of a CAFT arm divided by LoRA's, both with supervised logits alone.

    transformers computes all logits for LoRA. They are not counted, because skipping them is no
    merit of CAFT; so LoRA gets more steps rather than fewer.
    """
    settings = FineTuningSettings(model=plan.model, data=str(train), output="", **arm.settings)
    rows = read_jsonl(train, plan.sizes["train"])
    data = encode(rows, tokenizer_of(plan.model), settings.max_length)
    model: Any = prepare(whole_model(plan.model, dtype=settings.loading_dtype), settings)
    heads = model.base_model.auxiliary_heads["default"].config
    return ratio(
        ModelShapes.of(model),
        data,
        heads.head_type,
        min(settings.num_auxiliary_heads, heads.num_heads),
        heads.head_num_layers,
        settings.aux_token_fraction,
    )


def ratio(
    shapes: ModelShapes, data: EncodedData, head_type: str, num_heads: int, head_num_layers: int, fraction: float
) -> float:
    """`equal_flops` from counts; a query of a row of N tokens meets N / 2 keys on average."""
    keys = sum(len(row["input_ids"]) ** 2 for row in data.rows) / data.tokens / 2
    supervised = data.supervised_tokens / data.tokens
    caft = caft_step(shapes, keys, head_type, num_heads, supervised, fraction, head_num_layers=head_num_layers)
    return caft.total / lora_step(shapes, keys, supervised).total
