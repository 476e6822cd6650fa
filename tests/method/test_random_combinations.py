"""Random combinations of what a user may combine train as the naive reference does, or are refused by name."""

from __future__ import annotations

import math
import os
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from ..support.random_combinations.case import HALF, Case
from ..support.random_combinations.draw import draw
from ..support.random_combinations.model import CombinedModel
from ..support.random_combinations.refusals import may_be_refused, refusal_of
from ..support.random_combinations.steps import Step, Trained

SHORT_RUN = [*range(87, 112), 12, 13, 16]  # has each feature at least once, and refusals
SECONDS = int(os.environ.get("PEFT_CAFT_PROPERTY_SECONDS", "180"))
FIRST_SEED = int(os.environ.get("PEFT_CAFT_PROPERTY_SEED", "1000"))

# Of the norm of a gradient, and of the largest norm among all of them: gradients of queries and keys are differences of large
# numbers where a token sees one or two others. In fp32 a hundred roundings in a row (LAYER_OPERATIONS of
# tests/support/rounding.py times layers and heads) make 1e-5. In bf16, whose eps is 8e-3, and in fp16 under autocast sums are
# made in another order and rounded in other places: the worst of thousands of cases was 3e-2.
TOLERANCES = {"fp32": (1e-5, 3e-6)} | dict.fromkeys(HALF, (5e-2, 5e-3))
LOSS_TOLERANCES = {"fp32": 1e-5} | dict.fromkeys(HALF, 1e-2)


LORA = {"r": 4, "target_modules": "all-linear"}
# What the long run found: what was wrong, and a case that shows it.
FOUND = {
    # Only what the model is called with by name was looked at.
    "mask by position": Case(seed=1, method="full", positional=True, layout="left"),
    "labels by position": Case(seed=2, method="full", positional=True, layout="packed"),
    # Rows of the flattened labels were taken as rows of the flattened hidden states, once a right batch had been seen.
    "labels with fewer tokens": Case(seed=3, peft=LORA, before="a step", spoiled=("labels", "fewer tokens")),
    "labels with fewer rows": Case(seed=4, peft=LORA, before="a step", spoiled=("labels", "fewer rows")),
    # Mamba adds what its layers compute in the weights' dtype to a stream in fp32.
    "stream in fp32 beside weights in bf16": Case(
        seed=5,
        architecture="Mamba 2",
        peft=LORA | {"target_modules": ["in_proj"]},
        head_type="residual",
        precision="bf16 base",
    ),
    # With num_items_in_batch the loss of a micro-batch without a target is that of the router.
    "router loss without a target": Case(
        seed=6,
        architecture="Mixtral",
        router_loss=True,
        peft=LORA | {"target_modules": ["q_proj"]},
        labels="none",
        counted="tensor",
    ),
    # Parts were found before PEFT made other layers.
    "replicated layers": Case(seed=7, peft=LORA | {"layer_replication": [[0, 2], [1, 2]]}),
}


class Mismatch(AssertionError):
    """The package and the reference differ."""


def outcome(case: Case, folder: Path) -> str:
    """Train a case: equal, or refused and by which name; else a `Mismatch` or the package's error is raised."""
    expected = [*([refusal_of(case)] if case.spoiled else []), *may_be_refused(case)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            step = Step(CombinedModel(case, folder))
            got = step.by_package()
        # PEFT refuses an unknown `bias` by a NotImplementedError.
        except (ValueError, TypeError, NotImplementedError) as error:
            for pattern in expected:
                if re.search(pattern, str(error)):
                    return f"refused: {pattern}"
            raise
        if case.spoiled:
            raise Mismatch(f"trained with {case.spoiled}, expected a refusal that names {expected[0]!r}")
        require_equal(case, got, step.by_reference())
    require_warnings(case, step, [str(warning.message) for warning in warned])
    return "equal"


def require_warnings(case: Case, step: Step, messages: list[str]) -> None:
    """Each where it is true, and only there."""
    if case.method == "lora" and case.precision == "fp32" and case.adapters == "one":
        changed = {message.split(":")[0] for message in messages if "an adapter changes it" in message}
        if changed != step.changed_parts():
            raise Mismatch(f"warned of {changed}, expected {step.changed_parts()}")
    nothing = any("trains nothing" in message for message in messages)
    # Where embeddings are made to have a gradient, so has what the heads read.
    if not case.checkpointing and nothing != (case.beta > 0 and not step.heads_train):
        raise Mismatch(f"warned that heads train nothing: {nothing}, expected {not nothing}")


def require_equal(case: Case, got: Trained, expected: Trained) -> None:
    loss_tolerance = LOSS_TOLERANCES[case.precision]
    for own, wanted in zip(got.losses, expected.losses, strict=True):
        if math.isnan(wanted) != math.isnan(own) or abs(own - wanted) > loss_tolerance * abs(wanted) + 1e-7:
            raise Mismatch(f"loss {got.losses}, expected {expected.losses}")
    if got.metrics.keys() != expected.metrics.keys():
        raise Mismatch(f"metrics {got.metrics}, expected {expected.metrics}")
    for name, wanted in expected.metrics.items():
        if abs(got.metrics[name] - wanted) > loss_tolerance * abs(wanted) + 1e-6:
            raise Mismatch(f"{name} {got.metrics[name]}, expected {wanted}")
    if got.gradients.keys() != expected.gradients.keys() or not expected.gradients:
        raise Mismatch(f"trained parameters {got.gradients.keys()}, expected {expected.gradients.keys()}")
    own_share, share = TOLERANCES[case.precision]
    largest = max(float(gradient.float().norm()) for gradient in expected.gradients.values())
    for name, wanted in expected.gradients.items():
        error, norm = (float(x.float().norm()) for x in (got.gradients[name] - wanted, wanted))
        if math.isnan(largest):  # LoRA's own loss without a target
            continue
        if not error <= own_share * norm + share * largest:
            raise Mismatch(
                f"gradient of {name}: off by {error:.1e}, its norm is {norm:.1e}, the largest {largest:.1e}"
            )
    for own, wanted in zip(got.logits, expected.logits, strict=True):
        if not torch.allclose(own.float(), wanted.float(), rtol=loss_tolerance, atol=10 * loss_tolerance):
            raise Mismatch("logits differ")


@pytest.fixture(autouse=True)
def quiet():
    """It warns of token ids of real models beyond a vocabulary of 97."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("seed", SHORT_RUN)
def test_random_combination_trains_as_the_reference_or_is_refused_by_name(seed, tmp_path):
    case = draw(seed)
    if case.loss == "sft":
        pytest.importorskip("trl", reason="needs Python 3.11")
    print(case, outcome(case, tmp_path))


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_once_wrong(case, tmp_path):
    assert outcome(case, tmp_path) == ("refused: labels" if case.spoiled else "equal")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 300)
def test_many_random_combinations(tmp_path, capsys):
    """For ``PEFT_CAFT_PROPERTY_SECONDS`` from seed ``PEFT_CAFT_PROPERTY_SEED`` on; failures are printed and do not stop it."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    begin = reported = time.monotonic()
    seed = FIRST_SEED
    while time.monotonic() - begin < SECONDS:
        case = draw(seed)
        try:
            result = outcome(case, tmp_path)
        except Exception as error:
            result = "failed"
            failed.append(f"{type(error).__name__}: {error}\n    {case}")
            with capsys.disabled():
                print(f"\nFAILED {failed[-1]}", flush=True)
        counts[result] += 1
        seed += 1
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            with capsys.disabled():
                print(f"\n{progress(counts, seed)}", flush=True)
    with capsys.disabled():
        print(
            f"\n{progress(counts, seed)}", *(f"{n} {kind}" for kind, n in counts.most_common()), sep="\n", flush=True
        )
    assert not failed, f"{len(failed)} of {seed - FIRST_SEED} failed"
    assert counts["equal"] > 0.7 * (seed - FIRST_SEED)


def progress(counts: Counter[str], seed: int) -> str:
    refused = sum(n for kind, n in counts.items() if kind.startswith("refused"))
    return f"seeds to {seed - 1}: {counts['equal']} equal, {refused} refused, {counts['failed']} failed"
