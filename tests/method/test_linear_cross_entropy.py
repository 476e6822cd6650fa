"""The chunked linear cross entropy against the same written plainly, over dtypes, odd shapes and edge cases."""

import pytest
import torch

from peft_caft.heads import unembedding as module
from peft_caft.heads.unembedding import CHUNK_SIZES, ChunkSize, Unembedding, chunk_rows, chunks
from peft_caft.method.linear_cross_entropy import linear_cross_entropy, plain_cross_entropy, split_factor
from peft_caft.planning.live_memory import LiveMemory

VOCABULARY, HIDDEN = 37, 19
OPTIONS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}]


def reference(hidden, targets, layer: Unembedding, weights=None):
    logits = (hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias)).float() * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum(), losses.detach()


def layer_and_rows(rows: int, bias: bool = False, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias_values = torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    layer = Unembedding(weight.to(dtype), bias_values, **kwargs)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return layer, hidden, torch.randint(0, VOCABULARY, (rows,), generator=generator)


def gradient(function, hidden, *args, **kwargs):
    hidden.grad = None
    (2 * function(hidden, *args, **kwargs)[0]).backward()
    return hidden.grad.clone()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "most"), [(1, 100), (5, 5), (11, 4), (12, 4), (7, 1)])
def test_sum_losses_and_gradient_equal_plain_torch(rows, most, weighted, bias, options, monkeypatch):
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(most * VOCABULARY))
    layer, hidden, targets = layer_and_rows(rows, bias, **options)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) if weighted else None
    expected, expected_losses = reference(hidden, targets, layer, weights)
    for function in (linear_cross_entropy, plain_cross_entropy):
        total, losses = function(hidden, targets, layer, weights)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
        assert not losses.requires_grad
        got = gradient(function, hidden, targets, layer, weights)
        torch.testing.assert_close(got, gradient(reference, hidden, targets, layer, weights), rtol=1e-5, atol=1e-5)


def layer_gradients(function, hidden, targets, layer: Unembedding, *args) -> list[torch.Tensor]:
    for tensor in layer.trained:
        tensor.grad = None
    (2 * function(hidden, targets, layer, *args)[0]).backward()
    return [tensor.grad.clone() for tensor in layer.trained]


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "most"), [(0, 100), (5, 5), (11, 4)])
def test_trained_layer_gets_its_gradient(rows, most, weighted, options, trained, monkeypatch):
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(most * VOCABULARY))
    layer, hidden, targets = layer_and_rows(rows, bias=True, **options)
    for name in trained:
        getattr(layer, name).requires_grad_()
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) if weighted else None
    expected = layer_gradients(reference, hidden, targets, layer, weights)
    expected_of_hidden = gradient(reference, hidden, targets, layer, weights)
    for function in (linear_cross_entropy, plain_cross_entropy):
        got = layer_gradients(function, hidden, targets, layer, weights)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            gradient(function, hidden, targets, layer, weights), expected_of_hidden, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_layer_in_half_precision_is_about_as_exact_as_plain(dtype, autocast, monkeypatch):
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(40 * VOCABULARY))  # ten chunks, summed in fp32
    layer, hidden, targets = layer_and_rows(400, dtype=dtype)
    exact = Unembedding(layer.weight.float().requires_grad_())
    (expected,) = layer_gradients(reference, hidden.detach().float(), targets, exact)
    own = exact if autocast else Unembedding(layer.weight.requires_grad_())

    def error(function) -> float:
        with torch.autocast("cpu", dtype, enabled=autocast):
            (got,) = layer_gradients(function, hidden, targets, own)
        assert got.dtype == own.weight.dtype
        return float((got.float() - expected).norm() / expected.norm())

    assert error(linear_cross_entropy) <= 1.25 * error(reference)


def test_gradient_of_a_real_vocabulary_is_within_1e_5():
    torch.manual_seed(0)
    layer = Unembedding(torch.randn(50_000, 64) / 8)
    hidden, targets = torch.randn(300, 64, requires_grad=True), torch.randint(50_000, (300,))
    assert len(list(chunks(300, chunk_rows(300, layer.weight)))) > 1
    expected = gradient(reference, hidden, targets, layer)
    error = gradient(linear_cross_entropy, hidden, targets, layer) - expected
    assert error.norm() <= 1e-5 * expected.norm()


def test_no_rows_are_zero():
    layer, hidden, targets = layer_and_rows(0)
    loss, losses = linear_cross_entropy(hidden, targets, layer)
    loss.backward()
    assert loss == 0
    assert losses.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_half_precision(dtype, options):
    layer, hidden, targets = layer_and_rows(400, dtype=dtype, **options)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact_layer = Unembedding(layer.weight.float(), **options)
    weights = torch.full((400,), 0.7)
    expected = gradient(reference, exact_hidden, targets, exact_layer, weights)
    expected_loss = reference(exact_hidden, targets, exact_layer)[0]

    def errors(function) -> tuple[float, float]:
        loss = function(hidden, targets, layer)[0]
        assert loss.dtype == torch.float32
        gradient_error = (
            gradient(function, hidden, targets, layer, weights).float() - expected
        ).norm() / expected.norm()
        return float(gradient_error), float((loss - expected_loss).abs() / expected_loss)

    (ours, our_loss), (naive, naive_loss) = errors(linear_cross_entropy), errors(reference)
    assert ours <= 1.05 * naive
    assert our_loss <= naive_loss + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed(dtype):
    layer, hidden, targets = layer_and_rows(50)
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = linear_cross_entropy(hidden, targets, layer)
        expected, _ = reference(hidden, targets, layer)
    assert loss.dtype == torch.float32
    assert loss != linear_cross_entropy(hidden, targets, layer)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_fp64_stays_fp64():
    layer, hidden, targets = layer_and_rows(9, dtype=torch.float64)
    loss, losses = linear_cross_entropy(hidden, targets, layer)
    assert loss.dtype == losses.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, targets, layer)[0], hidden)


def test_without_gradients_none_is_kept():
    layer, hidden, targets = layer_and_rows(5)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, targets, layer)[0].requires_grad


def test_unlikely_target_has_a_finite_loss():
    layer = Unembedding(torch.eye(4) * 1000)
    loss, _ = linear_cross_entropy(torch.eye(4)[:1], torch.tensor([3]), layer)
    assert loss == 1000


@pytest.mark.parametrize("rows", [0, 1, 5, 170, 171, 1000])
def test_chunks_cover_all_rows_in_nearly_equal_parts(rows, monkeypatch):
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(170 * VOCABULARY))
    parts = list(chunks(rows, chunk_rows(rows, torch.empty(VOCABULARY, 2))))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == -(-rows // 170)
    assert not sizes or max(sizes) - min(sizes) < len(sizes)


def test_chunks_become_smaller_where_memory_is_short(monkeypatch):
    weight = torch.empty(1000, 2)
    usual = chunk_rows(10**6, weight)
    monkeypatch.setattr(module, "free_bytes", lambda device: usual * 1000 * 8 * 4 // 5)  # a fifth of what is usual
    assert usual / 12 < chunk_rows(10**6, weight) <= usual / 5
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    assert chunk_rows(10**6, weight) == 1


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < module.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("factor", [1.0, 0.75, 3e-7, 12345.678, 0.0])
def test_factor_is_split_exactly(factor):
    rest, power = split_factor(torch.tensor(factor))
    assert rest * power == torch.tensor(factor)
    assert factor == 0 or (0.5 <= rest < 1 and torch.frexp(power).mantissa == 0.5)


def test_nothing_of_a_chunk_is_there_beside_the_next_chunk(monkeypatch):
    rows, vocabulary = 64, 4096
    monkeypatch.setitem(CHUNK_SIZES, "cpu", ChunkSize(16 * vocabulary))
    layer = Unembedding(torch.randn(vocabulary, 8).bfloat16())
    hidden, targets = torch.randn(rows, 8).bfloat16().requires_grad_(), torch.zeros(rows, dtype=torch.int64)
    memory = LiveMemory()
    memory.leave_out([layer.weight, hidden, targets])
    with memory:
        linear_cross_entropy(hidden, targets, layer)
    # For each of a chunk's logits 2 bytes of workspace, 4 of what becomes dL/dlogits, and 2 of its bf16 form.
    assert memory.peak < 8.5 * 16 * vocabulary
