"""Per-head metrics, acceptance length, and the last layer run on hidden states of an earlier pass."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from peft_caft import AuxiliaryHeads
from peft_caft.heads.backbone import Backbone
from peft_caft.training.head_metrics import HeadEvaluation, evaluate_heads

from ..support.tiny_checkpoint import tiny_llama, tiny_tokenizer
from ..support.tiny_models import ARCHITECTURES, PECULIAR, VOCABULARY, tiny_model


def test_metrics_equal_those_of_full_logits():
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    heads = AuxiliaryHeads.from_base_model(model, 3)
    torch.manual_seed(0)
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    rows = []
    for length in (9, 17, 5, 12, 3):
        ids = torch.randint(3, 40, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    evaluation = evaluate_heads(heads, model, rows, DataCollatorForSeq2Seq(tokenizer), batch_size=2)
    losses, hits, top5 = ([[], [], []] for _ in range(3))
    accepted = []
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), row["labels"]
        logits = heads.logits(model, ids[None])
        for t in range(len(ids)):
            correct = []
            for k in (2, 3, 4):
                if t + k >= len(ids) or labels[t + k] == -100:
                    continue
                scores = logits[k - 2][0, t]
                losses[k - 2].append(-scores.log_softmax(0)[ids[t + k]])
                order = scores.argsort(descending=True)
                hits[k - 2].append(float(order[0] == ids[t + k]))
                top5[k - 2].append(float(ids[t + k] in order[:5]))
                correct.append(bool(order[0] == ids[t + k]))
            if len(correct) == 3:
                accepted.append([*correct, False].index(False))
    for index, head in enumerate(evaluation.heads):
        assert head.tokens_ahead == index + 2
        assert head.tokens == len(losses[index])
        assert head.cross_entropy == pytest.approx(float(torch.stack(losses[index]).mean()), rel=1e-5)
        assert head.top1 == pytest.approx(sum(hits[index]) / len(hits[index]))
        assert head.top5 == pytest.approx(sum(top5[index]) / len(top5[index]))
    assert evaluation.acceptance_length == pytest.approx(sum(accepted) / len(accepted))


def test_acceptance_length_counts_consecutive_hits_from_the_first_head_on():
    totals = torch.tensor([[2.0, 1, 2, 4], [3.0, 0, 1, 3], [5.0, 0, 0, 4]], dtype=torch.float64)
    evaluation = HeadEvaluation.from_totals(totals)
    assert evaluation.acceptance_length == 1.25
    assert [head.cross_entropy for head in evaluation.heads] == [0.5, 1.0]
    assert evaluation.weighted_cross_entropy(0.5) == pytest.approx(0.5 * 0.5 + 0.25 * 1.0)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *PECULIAR])
def test_the_last_layer_alone_gives_what_the_whole_pass_gave(architecture):
    model = tiny_model(architecture).eval()
    backbone = Backbone.of(model)
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (2, 14)),
        "attention_mask": torch.ones(2, 14),
        "use_cache": False,
    }
    inputs["attention_mask"][1, 9:] = 0
    calls = []
    hook = backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), backbone.capture() as records:
        backbone.trunk(**inputs)
        with backbone.starting_at_last_layer(records[0].last_layer_input):
            # What the layers before would read does not matter.
            backbone.trunk(**inputs | {"input_ids": torch.zeros_like(inputs["input_ids"])})
        backbone.trunk(**inputs)
    hook.remove()
    assert len(calls) == 2
    whole, replayed, again = records
    for name in ("last_layer_input", "last_hidden_state"):
        torch.testing.assert_close(getattr(replayed, name), getattr(whole, name))
        torch.testing.assert_close(getattr(again, name), getattr(whole, name))
    assert replayed.layer_kwargs.keys() == whole.layer_kwargs.keys()
