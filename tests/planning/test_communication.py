"""What devices send, by arithmetic, against the collectives of FSDP2 and DDP steps under torch's fake process group."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import PeftModel, get_peft_model
from simulated_fsdp import ShardedStep, fake_processes, sharded_step
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from peft_caft.planning.communication import Communication, Gathered, communication
from peft_caft.planning.live_memory import Simulation
from peft_caft.planning.memory import NF4_PACKED, PLACEMENTS, ModelBytes
from peft_caft.planning.plan import METHODS, peft_config
from peft_caft.planning.settings import PlanSettings
from peft_caft.planning.simulated_step import Batch, model_on_meta

from ..support.engines import HEADS, LAYERS, SIZES, accelerate_wraps_so
from ..support.tiny_models import CONFIGS, LLAMA_LIKE

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")


MODELS = {
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": CONFIGS["gemma2"](),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4, head_dim=8),
}


BATCH = Batch(rows=2, tokens=64, supervised=0.5)


RANK = 8


def model(method: str, name: str = "llama", r: int = RANK) -> PeftModel:
    return model_on_meta(
        MODELS[name], peft_config(PlanSettings(model="", r=r, num_auxiliary_heads=HEADS), method), torch.bfloat16
    )


@cache
def simulated(method: str, name: str, gpus: int = 8, checkpointing: bool = False, r: int = RANK) -> ShardedStep:
    with fake_processes(gpus):
        return sharded_step(model(method, name, r), BATCH, checkpointing)


def require_equal(got: Communication, expected: Communication) -> None:
    for part in ("forward", "backward", "gradients", "update"):
        assert getattr(got, part) == pytest.approx(getattr(expected, part), rel=1e-6), part


EACH_METHOD = (
    *((method, "llama") for method in METHODS),
    ("residual", "tied llama"),
    *(pytest.param(method, "tied llama", marks=pytest.mark.slow) for method in ("lora", "decoder_layer")),
)


@accelerate_wraps_so
@pytest.mark.parametrize(("method", "name"), EACH_METHOD)
def test_fsdp_sends_what_it_is_said_to(method, name):
    require_equal(communication(model(method, name), "FSDP", 8), simulated(method, name).sent)


@accelerate_wraps_so
@pytest.mark.parametrize(
    ("method", "name", "gpus", "checkpointing"),
    [
        ("decoder_layer", "llama", 3, True),  # 3 divides hardly anything
        ("lora", "gemma2", 4, False),
        pytest.param("residual", "tied llama", 3, True, marks=pytest.mark.slow),
        pytest.param("decoder_layer", "mixtral", 4, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_holds_with_checkpointing_uneven_parts_and_other_architectures(method, name, gpus, checkpointing):
    found = simulated(method, name, gpus, checkpointing, r=2)
    require_equal(communication(model(method, name, r=2), "FSDP", gpus), found.sent)


@accelerate_wraps_so
@pytest.mark.parametrize(("method", "name"), EACH_METHOD)
def test_parameters_of_a_device_and_whole_ones_are_what_memory_counts(method, name):
    found, expected = simulated(method, name), ModelBytes.of(model(method, name))
    assert found.shards == pytest.approx((expected.base + expected.adapter + expected.heads) / 8, rel=1e-3)
    assert found.whole == pytest.approx(expected.gathered("FSDP"), rel=0.01)


@accelerate_wraps_so
@pytest.mark.parametrize(("method", "divided"), [("residual", False), ("decoder_layer", True)])
def test_heads_keep_until_the_backward_pass_what_simulate_step_takes_them_to_keep(method, divided):
    """`simulate_step` marks parameters, where here an engine has really divided them."""
    whole, simulation = model(method), Simulation()
    simulation.take_over(whole)

    def kept() -> int:
        before = sum(simulation.live.values())
        loss = whole(**BATCH.arguments()).loss
        after = sum(simulation.live.values())
        loss.backward()
        return after - before

    with simulation:
        kept()  # the first step also compares fast ways with plain ones
        expected = {False: kept()}
        for parameter in whole.base_model.auxiliary_heads.parameters():
            parameter.ds_id = None
        expected[True] = kept()
    found = simulated(method, "llama").kept
    assert found == pytest.approx(expected[divided], rel=1e-3)
    assert found != pytest.approx(expected[not divided], rel=0.01)


def test_ddp_sends_the_gradients_of_the_adapter():
    base = AutoModelForCausalLM.from_config(MODELS["llama"], dtype=torch.bfloat16)
    whole = get_peft_model(base, peft_config(PlanSettings(model="", r=RANK), "residual")).train()
    summed = []

    def hook(state, bucket):
        summed.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    with fake_processes(8):
        parallel = DistributedDataParallel(whole)
        parallel.register_comm_hook(None, hook)
        parallel(**BATCH.arguments()).loss.backward()
    require_equal(communication(whole, "DDP", 8), Communication(gradients=2 * sum(summed) * 7 / 8))


LAYER = 2 * (256 * (2 * 256 + 2 * 128 + 3 * 688) + 2 * 256)  # bf16, with two norms


ADAPTER = 4 * RANK * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 688))  # fp32, of a layer


UNEMBEDDING, NORM = 2 * 4096 * 256, 2 * 256


def test_parts_of_a_llama_by_hand():
    lora, residual, decoder = (Gathered.of(model(method)) for method in METHODS)
    assert lora == Gathered(LAYERS * (LAYER + ADAPTER), 0, UNEMBEDDING, UNEMBEDDING, NORM, LAYERS * ADAPTER)
    assert residual.rest == NORM + HEADS * 2 * 256**2
    assert (residual.head_layers, decoder.head_layers) == (0, HEADS * LAYER)
    assert decoder.rest == lora.rest
    tied = Gathered.of(model("lora", "tied llama"))
    assert (tied.embedding, tied.lm_head) == (0, UNEMBEDDING)
    packed = Gathered.of(model("decoder_layer"), quantised=True)
    in_4_bits = LAYER / 2 - 2 * 256
    assert packed.layers == LAYERS * (in_4_bits * NF4_PACKED + 2 * 2 * 256 + ADAPTER)
    assert packed.head_layers == decoder.head_layers  # heads are not quantised
    filled = Gathered.of(model("lora", r=2), shards=8)
    inputs = 4 * 256 + 2 * 256 + 688  # of q, k, v, o, of gate and up, of down; the outputs are multiples of 8
    assert filled.trained - Gathered.of(model("lora", r=2)).trained == LAYERS * 4 * (8 - 2) * inputs


def test_every_placement_by_hand():
    models = [model(method) for method in METHODS]
    lora, residual, decoder = ({place: communication(own, place, 4) for place in PLACEMENTS} for own in models)
    layers, trained = LAYERS * (LAYER + ADAPTER), LAYERS * ADAPTER
    everything = layers + 2 * UNEMBEDDING + NORM
    require_equal(lora["one device"], Communication())
    require_equal(lora["DDP"], Communication(gradients=1.5 * trained))
    require_equal(lora["ZeRO-2"], Communication(gradients=1.5 * trained, update=0.75 * trained))
    require_equal(lora["FSDP"], Communication(0.75 * everything, 0.75 * (layers + UNEMBEDDING), 0.75 * trained))
    require_equal(lora["ZeRO-3"], Communication(0.75 * everything, 0.75 * (everything - UNEMBEDDING), 0.75 * trained))
    for place in ("one device", "DDP", "ZeRO-2"):
        assert lora[place] == residual[place] == decoder[place]
    # The root is gathered once by FSDP; ZeRO-3 gathers the lm_head once more for CAFT.
    heads = {"residual": HEADS * 2 * 256**2, "decoder_layer": HEADS * LAYER}
    assert residual["FSDP"].total - lora["FSDP"].total == 0.75 * heads["residual"]
    assert decoder["FSDP"].total - lora["FSDP"].total == 0.75 * 2 * heads["decoder_layer"]
    for method, caft in (("residual", residual), ("decoder_layer", decoder)):
        assert caft["ZeRO-3"].total - lora["ZeRO-3"].total == 0.75 * (2 * heads[method] + UNEMBEDDING)


def test_more_devices_send_more_each_and_never_all():
    residual = model("residual")
    sent = [communication(residual, "FSDP", gpus).total for gpus in (2, 4, 8, 1024)]
    assert sent[0] < sent[1] < sent[2] < sent[3]
    parts = Gathered.of(residual, shards=8)
    assert sent[2] < 2 * parts.total + parts.trained
