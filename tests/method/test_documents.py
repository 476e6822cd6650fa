"""No head predicts across the border of a document, whatever tells where that is."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from peft_caft import CAFTConfig
from peft_caft.method.documents import Documents
from peft_caft.method.targets import Supervision

from ..reference import reference_loss
from ..support.tiny_models import tiny_model, tokens
from .test_host_synchronisation import Calls, Operations

LENGTHS = (5, 1, 2, 6)
LENGTH = sum(LENGTHS)
NUMBERS = torch.tensor([[n for n, length in enumerate(LENGTHS, start=1) for _ in range(length)]])
POSITIONS = torch.tensor([[t for length in LENGTHS for t in range(length)]])
BLOCKS = (NUMBERS[:, None, :, None] == NUMBERS[:, None, None, :]).tril()
BOUNDS = torch.tensor([0, 5, 6, 8, 14], dtype=torch.int32)
ADDED = torch.zeros(BLOCKS.shape).masked_fill(~BLOCKS, torch.finfo(torch.float32).min)
ONES = torch.ones_like(NUMBERS)
# With an image of 2 x 2 from the second token of the last document on: one temporal position for all of it.
IMAGE = torch.stack([POSITIONS, POSITIONS, POSITIONS])
IMAGE[:, 0, 8:] = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])

TOLD_BY = {
    "position_ids": {"position_ids": POSITIONS},
    "position_ids that begin at 2": {"position_ids": POSITIONS + 2},
    "position_ids beside a mask": {"position_ids": POSITIONS, "attention_mask": ONES},
    "position_ids of three axes": {"position_ids": IMAGE},
    "position_ids of three axes and the text": {"position_ids": torch.cat([POSITIONS[None], IMAGE])},
    "seq_idx": {"seq_idx": NUMBERS.int() - 1},
    "cu_seq_lens_q": {"cu_seq_lens_q": BOUNDS, "max_length_q": 6},
    "cu_seq_lens_k": {"cu_seq_lens_k": BOUNDS.long()},
    "numbers in the mask": {"attention_mask": NUMBERS},
    "boolean mask of pairs": {"attention_mask": BLOCKS},
    "added mask of pairs": {"attention_mask": ADDED},
    "added mask of pairs in half precision": {"attention_mask": ADDED.clamp_min(-60000).half()},
    "one mask for each kind of layer": {"attention_mask": {"full_attention": BLOCKS, "sliding_attention": None}},
    "seq_idx beside position_ids that do not restart": {
        "seq_idx": NUMBERS, "position_ids": torch.arange(LENGTH)[None], "attention_mask": ONES
    },
}  # fmt: skip


def within(labels, k):
    """Rows of head k, written plainly."""
    return [t for t in range(LENGTH - k) if labels[0, t + k] != -100 and NUMBERS[0, t] == NUMBERS[0, t + k]]


@pytest.mark.parametrize("inputs", TOLD_BY.values(), ids=TOLD_BY)
def test_heads_stay_in_their_document(inputs):
    labels = tokens(1, LENGTH)
    labels[0, 2] = -100
    found = Supervision.of(labels, 6, inputs)
    assert [head.rows.tolist() for head in found.heads] == [within(labels, k) for k in range(2, 8)]
    assert found.next_token.count == LENGTH - 2  # as in the model's own loss


@pytest.mark.parametrize("inputs", TOLD_BY.values(), ids=TOLD_BY)
def test_several_sequences_are_told_like_one(inputs):
    labels = tokens(2, LENGTH)
    if "cu_seq_lens_q" in inputs or "cu_seq_lens_k" in inputs:  # they go through the flattened batch
        inputs = {"cu_seq_lens_q": torch.cat([BOUNDS, BOUNDS[1:] + LENGTH])}
    found = Supervision.of(labels, 2, inputs)  # other inputs are one for all sequences
    one = within(labels[:1], 2)
    assert found.heads[0].rows.tolist() == [*one, *(row + LENGTH for row in one)]


def test_transformers_tells_the_same_documents_by_positions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        positions = torch.randint(0, 3, (2, 12), generator=generator).cumsum(1) % 7
        expected = find_packed_sequence_indices(positions)
        (found,) = Documents.of({"position_ids": positions}, positions).numbers
        assert torch.equal(found, torch.zeros_like(found) if expected is None else expected)


def test_stretched_positions_beside_a_mask_are_one_document():
    labels = tokens(2, 8)
    stretched = {"position_ids": torch.arange(8).mul(2)[None], "attention_mask": torch.ones_like(labels)}
    assert Supervision.of(labels, 1, stretched).heads[0].count == 12


def test_left_padded_rows_are_one_document():
    labels = tokens(1, 6)
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]), "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])}
    assert Supervision.of(labels, 1, padded).heads[0].rows.tolist() == [2, 3]


def test_what_a_model_adds_to_scores_of_near_tokens_masks_nothing():
    """As alibi does, in a mask of one sequence."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    added = torch.where(distance >= 0, -0.5 * distance, -torch.inf)[None, None]
    assert Supervision.of(tokens(1, LENGTH), 1, {"attention_mask": added}).heads[0].count == LENGTH - 2


class BlockMask:
    shape = (1, 1, LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": ONES[0]}, r"attention_mask: got torch.int64 of shape \(14,\), expected \(1, 14\), or"),
        ({"attention_mask": BLOCKS[0]}, r"attention_mask: got torch.bool of shape \(1, 14, 14\)"),
        ({"attention_mask": BLOCKS.long()}, "attention_mask: got torch.int64 of shape .* boolean or floating"),
        ({"attention_mask": torch.ones(1, LENGTH + 2)}, r"attention_mask: got torch.float32 of shape \(1, 16\)"),
        ({"attention_mask": BlockMask()}, "attention_mask: got a BlockMask, expected a tensor"),
        (
            {"position_ids": POSITIONS[0]},
            r"position_ids: got torch.int64 of shape \(14,\), expected \(1, 14\) or \(axes, 1",
        ),
        ({"position_ids": POSITIONS[:, :-1]}, r"position_ids: got torch.int64 of shape \(1, 13\)"),
        ({"seq_idx": NUMBERS[0]}, r"seq_idx: got torch.int64 of shape \(14,\)"),
        (
            {"cu_seq_lens_q": BOUNDS[None]},
            r"cu_seq_lens_q: got torch.int32 of shape \(1, 5\), expected \(documents \+ 1,\)",
        ),
        ({"cu_seq_lens_q": BOUNDS.tolist()}, "cu_seq_lens_q: got a list, expected a tensor"),
    ],
)
def test_what_tells_no_documents_is_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        Supervision.of(tokens(1, LENGTH), 1, inputs)
    assert "auxiliary_loss_enabled(False)" in str(error.value)


def flattened(**options):
    rows = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in LENGTHS]
    return DataCollatorWithFlattening(**options)(rows)


PLAIN = flattened()
BATCHES = {
    "cu_seq_lens": flattened(return_flash_attn_kwargs=True, return_position_ids=False),
    "seq_idx": flattened(return_seq_idx=True, return_position_ids=False),
    "position_ids": PLAIN,
    "all": flattened(return_flash_attn_kwargs=True, return_seq_idx=True),
    "boolean mask of pairs": PLAIN | {"attention_mask": BLOCKS},
    "added mask of pairs": PLAIN | {"attention_mask": ADDED, "position_ids": None},
    "numbers in the mask": PLAIN | {"attention_mask": NUMBERS, "position_ids": None},
    "embeddings": PLAIN | {"inputs_embeds": torch.randn(1, LENGTH, 32), "input_ids": None},
}


@pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_packed_batches_train_on_the_equation(head_type, batch):
    config = CAFTConfig(
        num_auxiliary_heads=3,
        head_type=head_type,
        aux_loss_weight=1.0,
        aux_loss_schedule="constant",
        target_modules=["q_proj"],
    )
    model = get_peft_model(tiny_model("llama", attention="sdpa", use_cache=False), config).train()
    inputs, labels = dict(batch), batch["labels"]
    del inputs["labels"]
    mask = torch.zeros(5, 1, LENGTH, dtype=torch.bool)
    for k in range(2, 5):
        mask[k, 0, within(labels, k)] = True
    heads = model.base_model.auxiliary_heads["default"].heads
    expected = reference_loss(model.get_base_model(), heads, labels, beta=1, gamma=1, alpha=0.8, mask=mask, **inputs)
    torch.testing.assert_close(model(**batch)["loss"], expected)


@pytest.mark.parametrize("inputs", TOLD_BY.values(), ids=TOLD_BY)
def test_the_host_does_not_wait_to_tell_documents(inputs):
    labels = tokens(1, LENGTH)
    with Operations() as operations, Calls() as calls:
        Documents.of(inputs, labels).contain_both(2)
    assert not operations.found + calls.found
