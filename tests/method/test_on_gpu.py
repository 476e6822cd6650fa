"""CAFT on a CUDA device: `benchmarks/gpu/run.sh check` runs these tests, and their smoke run uses the CPU.

Right values come from the naive reference, in fp32 on the CPU, and from each fast path's plain twin on the device.
"""

from __future__ import annotations

import copy
import gc
import warnings
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_caft.heads.unembedding import Unembedding, chunk_rows, free_bytes
from peft_caft.method.linear_cross_entropy import linear_cross_entropy, plain_cross_entropy

from ..reference import reference_loss
from ..support.device import DEVICE, needs_cuda
from ..support.gradients import SETTINGS, caft, gradients
from ..support.tiny_models import LLAMA_LIKE, tiny_model, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")]
HEAD_TYPES = ("residual", "decoder_layer")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 2e-2}  # relative, of a whole gradient


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products without TF32, as the tolerances want it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def batch(length: int = 24, rows: int = 4) -> dict[str, torch.Tensor]:
    """Rows of two lengths, padded at the right, whose first third has no labels."""
    ids = tokens(rows, length).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def made(head_type: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **fields):
    model = caft(tiny_model("llama", attention=attention), head_type=head_type, **fields)
    model.get_base_model().to(dtype)
    model.auxiliary_heads.to(dtype)
    return model.to(DEVICE)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """All gradients together, since those of single matrices may be as small as the rounding of others."""
    assert got.keys() == expected.keys()
    assert got
    flat_got, flat_expected = (torch.cat([g.flatten().cpu() for g in each.values()]) for each in (got, expected))
    assert torch.isfinite(flat_got).all()
    assert (flat_got - flat_expected).norm() <= tolerance * flat_expected.norm()


def step_gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_loss_and_gradients_equal_the_reference(head_type, dtype):
    exact = made(head_type, dtype, "eager").float().cpu()  # the same rounded weights
    inputs = batch()
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    labels = on_cpu.pop("labels")
    allowed = torch.stack([_not_padded(on_cpu["attention_mask"], k) for k in range(6)])
    expected_loss = reference_loss(
        exact.get_base_model(), list(exact.auxiliary_heads["default"].heads), labels, beta=SETTINGS["aux_loss_weight"],
        gamma=1.0, alpha=exact.peft_config["default"].aux_loss_decay, mask=allowed, **on_cpu,
    )  # fmt: skip
    expected_loss.backward()
    model = made(head_type, dtype)
    loss = model(**inputs, use_cache=False).loss
    assert abs(float(loss) - float(expected_loss)) <= TOLERANCE[dtype] * float(expected_loss)
    assert_close(step_gradients(model, **inputs), gradients(exact), TOLERANCE[dtype])
    if head_type == "decoder_layer":  # else the fast path has given up, and the plain one was tested
        assert model.auxiliary_heads["default"].heads[0]._at_rows.works


def _not_padded(mask: torch.Tensor, tokens_ahead: int) -> torch.Tensor:
    allowed = mask.bool().clone()
    if tokens_ahead:
        allowed[:, :-tokens_ahead] &= mask[:, tokens_ahead:].bool()
    return allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_fast_paths_change_nothing(head_type, dtype):
    model, inputs = made(head_type, dtype), batch()
    fast = step_gradients(model, **inputs)
    with model.base_model.fast_paths_enabled(False):
        plain = step_gradients(model, **inputs)
    assert_close(fast, plain, TOLERANCE[dtype])


@needs_cuda
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_fp16_with_a_gradient_scaler_trains(head_type):
    model, inputs = made(head_type), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert scaler.get_scale() > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 97), (700, 1031), (9000, 32_003)])
def test_linear_cross_entropy_equals_the_plain_one(rows, vocabulary, dtype):
    if DEVICE.type == "cpu" and rows > 1000:
        pytest.skip("a large product, for a GPU")
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, 64, device=DEVICE, generator=generator)
    weight = torch.randn(vocabulary, 64, device=DEVICE, generator=generator) / 8
    targets = torch.randint(vocabulary, (rows,), device=DEVICE, generator=generator)
    exact_hidden = hidden.to(dtype).float().clone().requires_grad_()
    exact, _ = plain_cross_entropy(exact_hidden, targets, Unembedding(weight.to(dtype).float()))
    exact.backward()
    own_hidden = hidden.to(dtype).clone().requires_grad_()
    own, losses = linear_cross_entropy(own_hidden, targets, Unembedding(weight.to(dtype)))
    own.backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(own, exact, rtol=TOLERANCE[dtype] / 4, atol=0)
    difference = (own_hidden.grad.float() - exact_hidden.grad).norm()
    assert difference <= TOLERANCE[dtype] * exact_hidden.grad.norm()


@needs_cuda
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], ids=str)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_kind_of_attention_gives_the_same_gradients(head_type, backend):
    inputs = batch()
    expected = step_gradients(made(head_type, attention="eager"), **inputs)
    with sdpa_kernel(backend):
        assert_close(step_gradients(made(head_type), **inputs), expected, TOLERANCE[torch.float32])


@needs_cuda
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_flash_attention_gives_the_gradients_of_sdpa(head_type):
    inputs = batch()
    expected = step_gradients(made(head_type, torch.bfloat16), **inputs)
    own = made(head_type, torch.bfloat16, attention="flash_attention_2")
    assert_close(step_gradients(own, **inputs), expected, TOLERANCE[torch.bfloat16])


@needs_cuda
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_compiled_model_trains_as_an_eager_one(head_type):
    model, inputs = made(head_type), batch()
    expected = step_gradients(model, **inputs)
    model.zero_grad()
    torch.compile(model)(**inputs, use_cache=False).loss.backward()
    assert_close(gradients(model), expected, 1e-3)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_gradient_checkpointing_changes_no_gradient(head_type):
    model, inputs = made(head_type), batch()
    expected = step_gradients(model, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(step_gradients(model, **inputs), expected, 1e-5)


@needs_cuda
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_quantised_base_model_trains(head_type, tmp_path):
    from transformers import BitsAndBytesConfig

    config = LlamaConfig(**LLAMA_LIKE | {"hidden_size": 64, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map={"": 0})
    model, inputs = caft(base, head_type=head_type), batch()
    fast = step_gradients(model, **inputs)
    with model.base_model.fast_paths_enabled(False):
        assert_close(fast, step_gradients(model, **inputs), TOLERANCE[torch.bfloat16])


@needs_cuda
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_step_leaves_no_memory_behind(head_type):
    model, inputs = made(head_type, torch.bfloat16), batch()
    step_gradients(model, **inputs)
    model.zero_grad()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step_gradients(model, **inputs)
    model.zero_grad()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@needs_cuda
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_step_waits_for_the_device_once_more_than_that_of_lora(head_type, fraction):
    shared = {name: SETTINGS[name] for name in ("r", "target_modules")}
    lora = get_peft_model(tiny_model("llama", attention="sdpa"), LoraConfig(**shared)).to(DEVICE).train()
    assert _waits(made(head_type, aux_token_fraction=fraction)) == _waits(lora) + 1


def _waits(model) -> int:
    """How often the third step waits; the first ones verify the model."""
    inputs = batch()
    for _ in range(2):
        step_gradients(model, **inputs)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model(**inputs, use_cache=False).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


@needs_cuda
def test_chunks_shrink_where_memory_is_short():
    weight = torch.empty(128_256, 8, device=DEVICE, dtype=torch.bfloat16)
    roomy = chunk_rows(8192, weight)
    taken = torch.empty(int(free_bytes(DEVICE) - 2**30), dtype=torch.uint8, device=DEVICE)
    try:
        assert chunk_rows(8192, weight) < roomy
    finally:
        del taken
        torch.cuda.empty_cache()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_trained_adapter_merges_into_the_model_that_was_trained(head_type):
    model, inputs = made(head_type), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
