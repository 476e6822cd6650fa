"""A `Plan` as Markdown tables, which a terminal shows as well."""

from dataclasses import asdict

from ..basics.tables import markdown_table
from .memory import NF4_BYTES
from .plan import GIB, Cost, Option, Plan

METHOD_NAMES = {"lora": "LoRA", "residual": "CAFT, residual", "decoder_layer": "CAFT, decoder_layer"}
MIB = 2**20
GB, MB = 10**9, 10**6  # for communication, since links are rated in GB/s


def report(plan: Plan) -> str:
    """Parameters, operations, memory, what fits, communication, and the assumptions."""
    facts, settings = plan.facts, plan.settings
    title = (
        f"{facts['class']}: {facts['layers']} layers, hidden size {facts['hidden_size']:,}, vocabulary "
        f"{facts['vocab_size']:,}, {facts['attention']} attention; on each device a batch of {settings.batch_size} x "
        f"{settings.tokens:,} tokens, {settings.supervised:.0%} of them supervised; LoRA of rank {settings.r} on "
        f"{settings.target_modules}"
    )
    parts = [title, _parameters(plan), _costs(plan), *_memory(plan), _fitting(plan)]
    if plan.settings.gpus > 1:
        parts.append(_communication(plan))
    return "\n\n".join([*parts, _notes(plan)])


def _parameters(plan: Plan) -> str:
    heads = plan.settings.num_auxiliary_heads
    names = {
        "base": "base model",
        "adapter": "adapter",
        "residual_heads": f"{heads} residual heads",
        "decoder_layer_heads": f"{heads} decoder_layer heads",
    }
    return markdown_table(["", "parameters"], [[names[key], f"{count:,}"] for key, count in plan.parameters.items()])


def _costs(plan: Plan) -> str:
    def row(cost: Cost) -> list[str]:
        shares = (cost.over_lora, cost.over_skipping_lora, cost.over_lora_checkpointing)
        p = "" if cost.aux_token_fraction is None else f"{cost.aux_token_fraction:g}"
        return [METHOD_NAMES[cost.method], p, f"{cost.flops / 1e9:,.3f}", *(f"{share:+.1%}" for share in shares)]

    columns = ["", "p", "GFLOP/token", "over LoRA", "over LoRA that skips", "over LoRA, checkpointing"]
    return (
        "Operations of a step, for each token of the batch (p: aux_token_fraction; over LoRA with transformers' loss, which "
        "computes the logits of all tokens, and over one that skips tokens without a label)\n\n"
        f"{markdown_table(columns, [row(cost) for cost in plan.costs])}"
    )


def _memory(plan: Plan) -> list[str]:
    """One table for each placement and kind of weights, without the columns that are all 0."""
    unit, name, digits = (GIB, "GiB", 2) if max(o.memory.total for o in plan.options) >= GIB else (MIB, "MiB", 1)
    tables = []
    for placement, qlora in dict.fromkeys((o.placement, o.qlora) for o in plan.options):
        options = [o for o in plan.options if (o.placement, o.qlora) == (placement, qlora)]
        parts = [asdict(o.memory) for o in options]
        shown = [part for part in parts[0] if any(values[part] for values in parts)]
        header = ["", "checkpointing", *(part.replace("_", " ") for part in shown), "total"]
        rows = []
        for option, values in zip(options, parts, strict=True):
            sizes = [f"{size / unit:,.{digits}f}" for size in (*(values[p] for p in shown), option.memory.total)]
            rows.append([METHOD_NAMES[option.method], "yes" if option.gradient_checkpointing else "no", *sizes])
            if plan.settings.gpu_memory is not None:
                rows[-1].append("yes" if option.fits(plan.settings.gpu_memory) else "NO")
        if plan.settings.gpu_memory is not None:
            header.append("fits")
        where = "One device" if placement == "one device" else f"{placement} on {plan.settings.gpus} devices"
        weights = "QLoRA (NF4)" if qlora else plan.settings.dtype
        tables.append(f"{where}, {weights}: {name} on each device\n\n{markdown_table(header, rows)}")
    return tables


def _communication(plan: Plan) -> str:
    """What each device sends, which gradient checkpointing does not change, and what CAFT adds."""
    options = [option for option in plan.options if not option.gradient_checkpointing]
    unit, name = (GB, "GB") if max(o.communication.total for o in options) >= GB else (MB, "MB")
    totals = {(o.placement, o.qlora, o.method): o.communication.total for o in options}
    rows = []
    for option in options:
        sent, (place, method) = option.communication, (option.placement, option.method)
        either = totals[place, False, method] == totals[place, True, method]
        if either and option.qlora:
            continue
        sizes = [f"{size / unit:,.3f}" for size in (*asdict(sent).values(), sent.total)]
        weights = "either" if either else "QLoRA" if option.qlora else plan.settings.dtype
        over = f"{sent.total / totals[place, option.qlora, 'lora'] - 1:+.1%}"
        rows.append([place, weights, METHOD_NAMES[method], *sizes, over])
    header = ["", "weights", "", "forward", "backward", "gradients", "update", "total", "over LoRA"]
    return f"Communication: {name} that each of {plan.settings.gpus} devices sends in a step\n\n{markdown_table(header, rows)}"


def _fitting(plan: Plan) -> str:
    """A sentence for each method: the first option that fits, where plain ones come first."""
    limit = plan.settings.gpu_memory
    if limit is None:
        least, most = (pick(plan.options, key=_total) for pick in (min, max))
        return f"From {_described(least)} to {_described(most)}. --gpu-memory marks what fits."
    lines = []
    for method in dict.fromkeys(option.method for option in plan.options):
        options = [option for option in plan.options if option.method == method]
        fitting = [option for option in options if option.fits(limit)]
        if fitting:
            lines.append(f"{_described(fitting[0])} fits {limit:g} GiB.")
        else:
            lines.append(
                f"{METHOD_NAMES[method]} does not fit {limit:g} GiB; least is {_described(min(options, key=_total))}. "
                "Smaller --batch-size or --tokens, or more --gpus."
            )
    return "\n".join(lines)


def _total(option: Option) -> float:
    return option.memory.total


def _described(option: Option) -> str:
    means = ["QLoRA"] * option.qlora + ["gradient checkpointing"] * option.gradient_checkpointing
    name = METHOD_NAMES[option.method] + (f" with {' and '.join(means)}" if means else "")
    return f"{name} ({option.placement}, {option.memory.total / GIB:.2f} GiB)"


def _notes(plan: Plan) -> str:
    settings = plan.settings
    notes = [
        *plan.notes,
        "One step is simulated operation by operation on tensors without data. The table shows what fills memory at its peak: a "
        "loss of 0 says that the layers' backward pass needs more. Gradients count for the whole step, as under gradient "
        "accumulation. Not counted: CUDA and its libraries (about 0.5 GiB) and what the allocator cannot use (about 5 %), for "
        "which `fits` leaves room; and what kernels need inside.",
        "Rows have equal length, without padding. LoRA computes transformers' loss, with the logits of all tokens.",
        "Adapter, gradients and AdamW's two states are fp32. Heads are frozen and fresh.",
    ]
    if settings.gpus > 1:
        notes.append(
            "FSDP (FSDP2, full shard): a device holds two decoder layers whole at a time, or one and the lm_head, besides everything "
            "outside of both. ZeRO-3: it holds at most 10^9 parameters whole (stage3_max_live_parameters). ZeRO-2 divides gradients "
            "and optimizer states. DeepSpeed's buckets (reduce_bucket_size) are not counted. These figures are computed; those of "
            "FSDP were compared with the collectives of simulated steps. The README's limits say what was run."
        )
        notes.append(
            "Communication: rings, a forward and a backward pass and an update; neither the batch nor gradient checkpointing changes "
            "it. forward and backward: parameters are gathered; gradients: they are summed; update: updated parameters are gathered. "
            "Adapters and gradients in fp32. ZeRO-3 sends at most this, since it keeps what it needs again soon."
        )
        notes.append(
            "Heads that FSDP (decoder_layer) or ZeRO-3 divides compute all tokens, and keep their activations until the backward pass."
        )
    notes.append(
        f"QLoRA: linear layers in NF4 with double quantisation, {NF4_BYTES:.3f} bytes a weight; embeddings, lm_head, norms and heads in "
        f"{settings.dtype}; working weights: the largest matrix, dequantised. Arithmetic, not measured."
        + (
            " FSDP and ZeRO-3 divide packed weights only if bnb_4bit_quant_storage is a floating-point dtype, and never their constants."
            if settings.gpus > 1
            else ""
        )
    )
    return "Notes\n\n" + "\n".join(f"- {note}" for note in notes)
