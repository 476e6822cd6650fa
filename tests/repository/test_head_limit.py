"""The limit that benchmarks/head_limit.py measures, against the sum that defines it."""

from __future__ import annotations

import torch
from head_limit import second_token

from ..support.tiny_models import VOCABULARY, tiny_model


def test_the_token_after_the_next_is_the_sum_over_all_next_tokens():
    model = tiny_model("llama")
    row = torch.randint(1, VOCABULARY, (7,), generator=torch.Generator().manual_seed(0))
    logits, second = second_token(model, row, branches=VOCABULARY)
    torch.testing.assert_close(logits, model(row[None]).logits[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for position in range(len(row)):
            continued = torch.stack(
                [torch.cat([row[: position + 1], token[None]]) for token in torch.arange(VOCABULARY)]
            )
            both = model(continued).logits[:, -2:].softmax(dim=-1)
            expected = both[0, 0] @ both[:, 1]
            torch.testing.assert_close(second[position], expected, rtol=1e-4, atol=1e-5)


def test_fewer_branches_leave_out_the_least_likely():
    model = tiny_model("llama")
    row = torch.randint(1, VOCABULARY, (7,), generator=torch.Generator().manual_seed(0))
    logits, second = second_token(model, row, branches=5)
    followed = logits.softmax(dim=1).topk(5, dim=1).values.sum(dim=1)
    torch.testing.assert_close(second.sum(dim=1), followed, rtol=1e-4, atol=1e-5)
    assert torch.all(second <= second_token(model, row, branches=VOCABULARY)[1] + 1e-6)
