"""The command ``peft-caft plan``. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import settings_of

app = typer.Typer()


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Option(help="Base model: folder, config.json or Hub id. No weights are read.")],
    tokens: Annotated[int, typer.Option(help="Length of a row in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows on each GPU at a time (per_device_train_batch_size).")] = 8,
    supervised: Annotated[float, typer.Option(help="s: share of the tokens that have a label.")] = 0.5,
    aux_token_fraction: Annotated[
        float,
        typer.Option(
            help="p: share of the supervised positions that the heads see. Operations are shown for 1 and for p, or 0.25."
        ),
    ] = 1.0,
    num_auxiliary_heads: Annotated[int, typer.Option(help="n - 1.")] = 4,
    head_num_layers: Annotated[int, typer.Option(help="Blocks or layers per head.")] = 1,
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    target_modules: Annotated[str, typer.Option(help="'all-linear', or module names with commas.")] = "all-linear",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the base model and the heads.")
    ] = "bfloat16",
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Under bfloat16 autocast, as with --bf16 true in training.")
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(help="Number of GPUs: above 1 for DDP, ZeRO-2, FSDP and ZeRO-3, with what each sends in a step."),
    ] = 1,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="Memory of each GPU in GiB, such as 24 or 80: marks what fits.", show_default=False),
    ] = None,
    attention: Annotated[
        Literal["sdpa", "eager"] | None,
        typer.Option(help="Attention implementation. [default: what transformers takes]", show_default=False),
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="What to plan for: a GPU computes more logits at a time.")
    ] = "cuda",
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write everything to, sizes in bytes.", show_default=False)
    ] = None,
) -> None:
    """What training would take: parameters, operations, memory and communication per GPU, for LoRA and CAFT, from a model's config.

    A training step is simulated on tensors without data, with and without gradient checkpointing, and parameters are counted for
    one GPU, or for DDP, ZeRO-2, FSDP and ZeRO-3, with and without QLoRA. Takes half a minute for 32 layers, and little memory.
    """
    from ..basics.files import write_text
    from ..planning.plan import PlanSettings, plan
    from ..planning.report import report

    found = plan(settings_of(PlanSettings, locals()))
    typer.echo(report(found))
    if json is not None:
        write_text(json, found.to_json())
        typer.echo(f"\nWritten to {json}")
