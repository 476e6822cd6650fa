"""README's table of engines and stages, made of the tests that its cells stand for."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..support.tables import table_in_readme
from . import test_deepspeed as zero
from . import test_distillation as distillation
from . import test_sft_processes as sft
from . import test_stage1_processes as stage_1
from . import test_stage2_processes as stage_2

SAME, KILLED = "yes", "yes, resumed"
DISTILL = (SAME, distillation.test_two_processes_write_the_same_file_as_one)
TAKEN_UP = stage_2.test_sharded_model_trains_as_a_whole_one_and_is_taken_up_when_killed
WHOLE = stage_2.test_two_processes_train_a_whole_model_as_one_does
STAGES = (
    "`distill`",
    "`train-heads`",
    "its cache",
    "LoRA",
    "LoRA, heads trained along",
    "full fine-tuning",
    "`SFTTrainer`",
)
# In the order of the stages: what the cell says, and the test that says it.
CELLS: dict[str, tuple[tuple[str, Callable], ...]] = {
    "DDP": (
        DISTILL,
        (KILLED, stage_1.test_two_processes_fill_one_cache_and_take_up_what_was_killed),
        (KILLED, stage_1.test_two_processes_fill_one_cache_and_take_up_what_was_killed),
        (SAME, stage_2.test_two_processes_train_as_one_does),
        (SAME, stage_2.test_two_processes_train_as_one_does),
        (KILLED, WHOLE),
        (SAME, sft.test_two_processes_train_as_one_does),
    ),
    "FSDP2": (
        DISTILL,
        (KILLED, stage_1.test_sharded_models_train_as_whole_ones_and_are_taken_up_when_killed),
        ("refused", stage_1.test_sharding_that_cannot_work_is_refused),
        (KILLED, TAKEN_UP),
        (KILLED, TAKEN_UP),
        (KILLED, WHOLE),
        (SAME, sft.test_two_processes_train_as_one_does),
    ),
    "FSDP1": (
        DISTILL,
        ("refused", stage_1.test_sharding_that_cannot_work_is_refused),
        ("refused", stage_1.test_sharding_that_cannot_work_is_refused),
        *[("refused", stage_2.test_fsdp1_is_refused)] * 4,
    ),
    "ZeRO-2": (
        DISTILL,
        (KILLED, zero.test_stage_1_trains_as_one_process_does_and_is_taken_up_when_killed),
        (KILLED, zero.test_zero2_fills_a_cache_and_is_taken_up_when_killed),
        (KILLED, zero.test_stage_2_trains_as_one_process_does_and_is_taken_up_when_killed),
        (KILLED, zero.test_stage_2_trains_as_one_process_does_and_is_taken_up_when_killed),
        (KILLED, zero.test_whole_model_trains_as_in_one_process_and_is_taken_up_when_killed),
        (SAME, sft.test_two_processes_train_as_one_does),
    ),
    "ZeRO-3": (
        DISTILL,
        (KILLED, zero.test_stage_1_trains_as_one_process_does_and_is_taken_up_when_killed),
        ("refused", zero.test_stage_1_refuses_a_cache_for_partitioned_models),
        (KILLED, zero.test_stage_2_trains_as_one_process_does_and_is_taken_up_when_killed),
        (KILLED, zero.test_stage_2_trains_as_one_process_does_and_is_taken_up_when_killed),
        (f"{KILLED}; unembedding frozen, else refused", zero.test_trained_unembedding_in_parts_is_refused),
        (SAME, sft.test_two_processes_train_as_one_does),
    ),
}


def table() -> str:
    lines = ["| engine | " + " | ".join(STAGES) + " |", "|---|" + "---|" * len(STAGES)]
    for engine, cells in CELLS.items():
        assert len(cells) == len(STAGES)
        lines.append(f"| {engine} | {' | '.join(says for says, _ in cells)} |")
    return "\n".join(lines)


def test_cells_say_what_their_tests_say():
    """A refusal is tested by a test of a refusal, and a resumed run by one that kills."""
    for cells in CELLS.values():
        for says, test in cells:
            assert ("refuse" in says) == ("refuse" in test.__name__), test
            assert ("resumed" in says) <= bool(re.search("killed|refuse|whole_model", test.__name__)), test


def test_readme_has_the_table():
    assert table_in_readme("engines") == table()
